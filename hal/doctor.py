"""``glm5-hal doctor``: every backend, what was found, what is wrong, what to do.

Plugins are loaded, probed and tried in subprocesses with a deadline, so none can hang or crash the doctor.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from glm5_hal import context, plugins
from glm5_hal import policy as policies
from glm5_hal.backend import Device
from glm5_hal.errors import HalError
from glm5_hal.ops import names
from glm5_hal.plugins import Checkup
from glm5_hal.plugins.record import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Distributions whose versions matter to someone who reads a report.
REPORTED = ("glm5-hal", "torch", "triton", "numpy", "pluggy", "onnxruntime", "transformers")


@dataclass(frozen=True)
class Patient:
    """One backend. ``state`` is ok, absent (no such device here: not a fault), or broken. ``communicator`` is what
    torch.distributed calls its collectives ("" where it has none)."""

    name: str
    state: str
    source: str
    finding: str
    fix: str = ""
    device: Mapping[str, Any] = field(default_factory=dict)
    communicator: str = ""
    kernel: str = ""
    output: str = ""


@dataclass(frozen=True)
class Diagnosis:
    backends: tuple[Patient, ...]
    versions: Mapping[str, str]
    settings: Mapping[str, str]
    problem: str

    @property
    def ok(self) -> bool:
        return not self.problem and all(p.state != "broken" for p in self.backends)

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def examine(timeout: float = 20.0) -> Diagnosis:
    """Look at every installed backend and at the environment's settings."""
    checkups = plugins.check_up_all(context.catalogue().found, timeout)
    patients = tuple(map(_patient, checkups))
    settings: dict[str, str] = {}
    problem = ""
    try:
        found = policies.from_environment(os.environ)
        # From what was told of them: to ask the plugins here could end or hang the doctor.
        offered = {c.record.name: c.providers for c in checkups if c.providers is not None}
        policies.validate(found.policy, names(), context.catalogue().names, offered.get)
        settings = {
            "GLM5_BACKEND": f"{found.policy.text} ({found.policy.provenance})",
            "GLM5_LOG": f"{found.log.level} ({found.log.provenance})",
            "GLM5_SHADOW": f"{found.shadow} ({found.shadow.provenance})",
        }
        settings |= dict.fromkeys(found.foreign, "not ours: ignored")
    except HalError as wrong:
        problem = str(wrong)
    return Diagnosis(patients, _versions(), settings, problem)


def _patient(checked: Checkup) -> Patient:
    record, found, kernel = checked.record, checked.found, checked.kernel
    kernel = printable(kernel)
    about: dict[str, Any] = {"name": record.name, "source": record.origin, "output": record.output}
    about["communicator"] = record.communicator or ""
    if record.status != "ok" or found is None:
        return Patient(state="broken", finding=record.reason, fix=record.fix, **about)
    if not isinstance(found, Device):
        state = "broken" if found.fault else "absent"
        return Patient(state=state, finding=printable(found.reason), fix=printable(found.fix), **about)
    facts = {
        "type": found.type,
        "name": found.name,
        "arch": found.arch,
        "count": found.count,
        "evidence": found.evidence,
        "versions": dict(found.versions),
    }
    finding, fix = printable(f"{found.name} ({found.arch}), {found.count} visible"), ""
    if kernel.startswith("failed"):
        fix = "reinstall the backend's package, or report this output to its vendor"
    state = "broken" if fix else "ok"
    return Patient(state=state, finding=finding, fix=fix, device=facts, kernel=kernel, **about)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in REPORTED:
        try:
            found[name] = metadata.version(name) or "without a version"
        except metadata.PackageNotFoundError:
            continue
        except (OSError, ValueError) as problem:
            found[name] = f"cannot be read: {problem}"
    return found


def render(found: Diagnosis) -> RenderableType:
    """The diagnosis for a terminal: the table, then each fix in full."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("backend", "state", "from", "finding", "collectives", "kernel", header_style="bold")
    colours = {"ok": "green", "absent": "yellow", "broken": "red"}
    for p in found.backends:
        told = (Text(p.finding), Text(p.communicator), Text(p.kernel))
        table.add_row(p.name, Text(p.state, colours[p.state]), p.source, *told)
    fixes = [Text(f"{p.name}: {p.fix}") for p in found.backends if p.fix]
    lines = [Text("  ".join(f"{k} {v}" for k, v in found.versions.items()))]
    lines += [Text(f"{k} = {v}") for k, v in found.settings.items()]
    if found.problem:
        lines.append(Text(found.problem, "red"))
    return Group(*lines, table, *([Text("What to do:", "bold"), *fixes] if fixes else []))
