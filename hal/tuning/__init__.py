"""``glm5-hal tune``: better block sizes for the device at hand, measured at GLM-5's widths and kept in the backend's
tuning file."""

from __future__ import annotations

import datetime
import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_hal import context
from glm5_hal.backend import Device, Sizes, Tunable, Unavailable
from glm5_hal.errors import HalError
from glm5_hal.tuning.search import Search, Timer, search
from glm5_hal.tuning.sections import parsed, replace_file, with_sections

if TYPE_CHECKING:
    from rich.console import RenderableType

    from glm5_hal.conformance.workloads import Workload


@dataclass(frozen=True)
class Tuned:
    """What ``tune`` did: on which device, in which file, op by op."""

    backend: str
    device: str
    arch: str
    source: str
    file: str
    ops: tuple[Search, ...]

    @property
    def wrote(self) -> bool:
        return any(one.seconds for one in self.ops)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ops": [{**asdict(one), "gain": one.gain} for one in self.ops]}


def tune(
    backend: str,
    only: Sequence[str] = ("*",),
    *,
    seconds: float = 0.2,
    out: Path | None = None,
    progress: bool = False,
    calls: Sequence[Workload] | None = None,
    timer: Timer | None = None,
) -> Tuned:
    """Measure a backend's kernels with other block sizes, and write those that are faster.

    Args:
        only: globs of ops.
        seconds: time budget of one call with one choice of sizes.
        out: the tuning file that is written, the backend's own if not given.
        calls, timer: what is timed and how, GLM-5's calls on the device's own clock if not given.

    Raises:
        HalError: UNKNOWN, PLUGIN or UNAVAILABLE for the backend; CONFIG where its kernels have nothing to tune, or
            where the file cannot be written.
    """
    from glm5_hal.conformance.report import progress as bar
    from glm5_hal.conformance.timing import seconds_of
    from glm5_hal.conformance.workloads import TUNED, workloads

    tunable, device = _asked(backend)
    file = out or tunable.file
    _check_writable(file)
    sizes = tunable.sizes(device.arch)
    chosen, known = _chosen(only, sizes), tuple(workloads(TUNED) if calls is None else calls)
    source = _source(device)
    found: list[Search] = []
    try:
        with bar(len(chosen), progress) as shown:
            for op in chosen:
                of_op = [call for call in known if call.op == op]
                found.append(search(op, sizes[op], tunable, device, of_op, timer or seconds_of, seconds))
                if shown:
                    shown[0].update(shown[1], advance=1, description=op)
    finally:  # what was measured before an interruption was measured
        _write(file, tunable.file, device.arch, source, [one for one in found if one.seconds])
    return Tuned(backend, device.name, device.arch, source, str(file), tuple(found))


def _asked(backend: str) -> tuple[Tunable, Device]:
    catalogue = context.catalogue()
    tunable = catalogue.backend(backend).tuning
    if tunable is None:
        what = f"backend {backend} has nothing to tune: its kernels' block sizes are not data"
        raise HalError("CONFIG", what, value=backend, fix="name a backend with a tuning file, or give this one its own")
    device = catalogue.device(backend)
    if isinstance(device, Unavailable):
        raise HalError("UNAVAILABLE", f"backend {backend}: {device.reason}", value=backend, fix=device.fix)
    return tunable, device


def _chosen(only: Sequence[str], sizes: Sizes) -> list[str]:
    """The ops with block sizes that match one of these globs."""
    from glm5_hal.conformance.cases import ops_named

    ops_named(only)
    matching = [op for op in sizes if any(fnmatch.fnmatch(op, pattern) for pattern in only)]
    if not matching:
        what = f"no op with block sizes matches {', '.join(only)}"
        raise HalError("CONFIG", what, value=only, fix=f"those with sizes are {', '.join(sizes)}")
    return matching


def _check_writable(file: Path) -> None:
    """Before anything is measured."""
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        what = f"{file} cannot be written"
        raise HalError("CONFIG", what, value=str(file), fix="name a file of your own: --out FILE")


def _source(device: Device) -> str:
    """Where the numbers come from: the device, what compiled and ran the kernels, and the day."""
    versions = [f"{what} {device.versions[what]}" for what in ("driver", "triton") if device.versions.get(what)]
    return ", ".join([device.name, *versions, datetime.date.today().isoformat()])


def _write(file: Path, own: Path, arch: str, source: str, found: Sequence[Search]) -> None:
    """Into the file, or beside what the backend's own file says, where there is no such file yet."""
    if not found:
        return
    text = next((f.read_text(encoding="utf-8") for f in (file, own) if f.exists()), "")
    before: Mapping[str, Any] = parsed(text).get("arch", {}).get(arch, {})
    measured = [one.op for one in found]
    others = [name for name, value in before.items() if isinstance(value, dict) and name not in (*measured, "limits")]
    if others and "source" in before:
        source = f"{before['source']}; {', '.join(measured)}: {source}"
    sections: dict[tuple[str, ...], Mapping[str, Any]] = {("arch", arch): {"source": source}}
    sections |= {("arch", arch, one.op): dict(one.after) for one in found}
    replace_file(file, with_sections(text, sections))


def render(found: Tuned) -> RenderableType:
    """The searches for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("op", "sizes", header_style="bold")
    for column in ("before", "after", "gain", "tried", "passed over"):
        table.add_column(column, justify="right")
    for one in found.ops:
        sizes, times = one.skipped, ("-", "-", "-")
        if not one.skipped:
            sizes = " ".join(f"{k}={v}" for k, v in one.after.items() if v != one.before[k]) or "as before"
            times = (f"{one.seconds_before * 1e6:.1f} us", f"{one.seconds * 1e6:.1f} us", f"{one.gain:.2f}x")
        table.add_row(one.op, Text(sizes), *times, str(one.tried), str(len(one.passed_over)))
    said = ["nothing was written"]
    if found.wrote:
        said = [f"written to {found.file}: [arch.{found.arch}], {found.source}"]
        said.append(f"what computes there now is judged by: glm5-hal conformance run --backend {found.backend}")
    return Group(Text(f"measured on {found.device}"), table, *map(Text, said))
