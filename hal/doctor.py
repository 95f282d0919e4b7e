"""``glm5-hal doctor``: every backend, what was found, what is wrong, what to do.

Probes run in subprocesses with a deadline, so a broken driver cannot hang or crash the doctor.
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
from glm5_hal.plugins import PluginRecord

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Distributions whose versions matter to someone who reads a report.
REPORTED = ("glm5-hal", "torch", "triton", "numpy", "pluggy", "onnxruntime", "transformers")


@dataclass(frozen=True)
class Patient:
    """One backend. ``state`` is ok, absent (no such device here: not a fault), or broken."""

    name: str
    state: str
    source: str
    finding: str
    fix: str = ""
    device: Mapping[str, Any] = field(default_factory=dict)
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
    patients = tuple(_examined(record, timeout) for record in context.catalogue().records)
    settings: dict[str, str] = {}
    problem = ""
    try:
        found = policies.from_environment(os.environ)
        context.validate(found.policy)
        settings = {
            "GLM5_BACKEND": f"{found.policy.text} ({found.policy.provenance})",
            "GLM5_LOG": f"{found.log.level} ({found.log.provenance})",
        }
        settings |= dict.fromkeys(found.foreign, "not ours: ignored")
    except HalError as wrong:
        problem = str(wrong)
    return Diagnosis(patients, _versions(), settings, problem)


def _examined(record: PluginRecord, timeout: float) -> Patient:
    source = f"{record.dist} {record.version}"
    if record.status != "ok":
        return Patient(record.name, "broken", source, record.reason, record.fix, output=record.output)
    found = plugins.probe_in_subprocess(record, timeout)
    if not isinstance(found, Device):
        state = "broken" if found.fault else "absent"
        return Patient(record.name, state, source, found.reason, found.fix, output=record.output)
    facts = {
        "type": found.type,
        "name": found.name,
        "arch": found.arch,
        "count": found.count,
        "evidence": found.evidence,
        "versions": dict(found.versions),
    }
    finding, fix = f"{found.name} ({found.arch}), {found.count} visible", ""
    kernel = _tiny_kernel(record.name)
    if kernel.startswith("failed"):
        fix = "reinstall the backend's package, or report this output to its vendor"
    return Patient(record.name, "broken" if fix else "ok", source, finding, fix, facts, kernel, output=record.output)


def _tiny_kernel(backend: str) -> str:
    """Run rms_norm on two numbers with a known answer: the bare kernel, whatever the environment's settings are."""
    import torch

    from glm5_hal import ops

    try:
        device = context.catalogue().device(backend)
        if not isinstance(device, Device):
            return f"failed: outside the probe's own process, {device.reason}"
        if not context.catalogue().kernels(backend, "rms_norm"):
            return "no rms_norm to try"
        x = torch.tensor([[3.0, 4.0]], device=device.type)
        with context.use(backend), torch.inference_mode():
            choice = ops.rms_norm.choose(x, torch.ones_like(x[0]), eps=0.0)
            kernel, y = choice.name, choice.kernel.fn(x, torch.ones_like(x[0]), eps=0.0).cpu()
    except Exception as problem:  # noqa: BLE001 - whatever a vendor's kernel raises is the finding
        return f"failed: {type(problem).__name__}: {problem}"
    expected = torch.tensor([[3.0, 4.0]]) / 12.5**0.5
    if not torch.allclose(y.float(), expected, rtol=1e-2):
        return f"failed: {kernel} gave {y.tolist()}, the answer is {expected.tolist()}"
    return f"rms_norm on {kernel}: right"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in REPORTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def render(found: Diagnosis) -> RenderableType:
    """The diagnosis for a terminal: the table, then each fix in full."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("backend", "state", "from", "finding", "kernel", header_style="bold")
    colours = {"ok": "green", "absent": "yellow", "broken": "red"}
    for p in found.backends:
        table.add_row(p.name, Text(p.state, colours[p.state]), p.source, Text(p.finding), Text(p.kernel))
    fixes = [Text(f"{p.name}: {p.fix}") for p in found.backends if p.fix]
    lines = [Text("  ".join(f"{k} {v}" for k, v in found.versions.items()))]
    lines += [Text(f"{k} = {v}") for k, v in found.settings.items()]
    if found.problem:
        lines.append(Text(found.problem, "red"))
    return Group(*lines, table, *([Text("What to do:", "bold"), *fixes] if fixes else []))
