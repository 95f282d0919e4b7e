"""A made-up vendor's plugins, as source text, and the folder that they are installed into."""

import importlib
import textwrap
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import pytest

from glm5_hal.backend import Device, Unavailable
from glm5_hal.catalogue import Catalogue
from glm5_hal.hookspecs import GROUP
from glm5_hal.plugins import LOAD_DEADLINE, PROBE_DEADLINE, PluginRecord, check_up, discovery, find

HEAD = """
from glm5_hal import Backend, Device, Kernel, Unavailable, hookimpl
def probe():
    return Device(type="cpu", name="Acme One", arch="a1", versions={"sdk": "1.2"}, features=frozenset({"fp8", "bf16"}))
def kernels():
    return ()
"""
GOOD = """
@hookimpl
def glm5_backend():
    return Backend(name=NAME, device_type="cpu", probe=probe, kernels=kernels)
"""


def probe_in_a_child(record: PluginRecord, deadline: float = PROBE_DEADLINE) -> Device | Unavailable:
    """What the probe finds there, or why the plugin could not be loaded there."""
    checked = check_up(record, deadline, "probe")
    return checked.found or Unavailable(checked.record.reason, checked.record.fix, fault=True)


def discover(
    entry_points: Iterable[metadata.EntryPoint] | None = None,
    *,
    given: Sequence[str] = (),
    deadline: float = LOAD_DEADLINE,
) -> tuple[PluginRecord, ...]:
    """Every plugin, found and loaded, in order. Each outside one has ``deadline`` seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery, "LOAD_DEADLINE", deadline)
        return Catalogue(find(entry_points, given)).records


class Site:
    """A folder on sys.path that plugins are installed into, as pip would leave them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def install(
        self,
        name: str,
        source: str | None = GOOD,
        *,
        dist: str = "",
        version: str = "1.0",
        value: str = "",
        head: str = HEAD,
        entry_points: str = "",
    ) -> Path:
        """Metadata of one distribution, and its module unless ``source`` is None. Returns the module's file."""
        dist, module = dist or f"{name}-hal", f"{name}_plugin"
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        lines = entry_points or f"[{GROUP}]\n{name} = {value or module}\n"
        (info / "entry_points.txt").write_text(lines)
        file = self.folder / f"{module}.py"
        if source is not None:
            file.write_text(f"NAME = {name!r}\n{head}{textwrap.dedent(source)}")
        importlib.invalidate_caches()
        return file

    def records(self, deadline: float = LOAD_DEADLINE) -> list[PluginRecord]:
        """What is discovered in this folder; a glm5-hal that is installed beside it is left out."""
        dists = {d.metadata["Name"] for d in metadata.distributions(path=[str(self.folder)])}
        return [record for record in discover(deadline=deadline) if record.dist in dists]

    def record(self, name: str, deadline: float = LOAD_DEADLINE) -> PluginRecord:
        (found,) = [record for record in self.records(deadline) if record.name == name]
        return found


def hook(result: str = 'Backend(NAME, "cpu", probe, kernels)', argument: str = "", decorator: str = "@hookimpl") -> str:
    return f"\n{decorator}\ndef glm5_backend({argument}):\n    return {result}\n"


def backend(**fields: object) -> str:
    more = "".join(f", {name}={value!r}" for name, value in fields.items())
    return hook(f'Backend(NAME, "cpu", probe, kernels{more})')


def probing(body: str, **fields: object) -> str:
    return f"\ndef probe():\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n{backend(**fields)}"


def wait_for(gate: Path) -> str:
    return f"\nimport os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"


def line_of(file: Path, text: str) -> str:
    """``file:line`` of the line that holds ``text``."""
    lines = file.read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if text in line]
    return f"{file}:{number}"
