"""Why a call goes where it goes: every candidate's answer, for a real call or for one described by its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm5_hal import context
from glm5_hal.errors import HalError, suggest
from glm5_hal.metadata import bind_axes, shape_of, signature_of
from glm5_hal.policy import Target
from glm5_hal.resolve import Catalogue, Resolution, Step, left_out, resolve
from glm5_hal.signature import Signature, TensorMeta
from glm5_hal.spec import OpSpec, declared
from glm5_hal.supposing import Supposed


@dataclass(frozen=True)
class Explanation:
    """What was asked, under which policy, and what each candidate said. ``str()`` is the table.

    ``supposed``: the architecture of the devices that the answers suppose; "" where they are those that are there.
    """

    call: Signature
    policy: str
    provenance: str
    resolution: Resolution
    left_out: tuple[Step, ...] = ()
    supposed: str = ""

    @property
    def ok(self) -> bool:
        return self.resolution.chosen is not None

    def as_dict(self) -> dict[str, Any]:
        chosen = self.resolution.chosen
        return {
            "op": self.call.op,
            "policy": {"text": self.policy, "provenance": self.provenance},
            "supposed": self.supposed or None,
            "tensors": {n: {"dtype": m.dtype, "shape": list(m.shape)} for n, m in self.call.tensors.items() if m},
            "scalars": dict(self.call.scalars),
            "chosen": chosen.name if chosen else None,
            "trace": [step.as_dict() for step in self.resolution.trace],
            "left_out": [step.as_dict() for step in self.left_out],
        }

    def __str__(self) -> str:
        tensors = ", ".join(f"{n} {m.dtype}{list(m.shape)}" for n, m in self.call.tensors.items() if m)
        scalars = ", ".join(f"{n}={v}" for n, v in self.call.scalars.items())
        lines = [f"{self.call.op}({tensors}; {scalars})", f"policy: {self.policy} ({self.provenance})"]
        if self.supposed:
            lines.append(f"supposed: a device of architecture {self.supposed}, with every feature; none was asked")
        chosen = self.resolution.chosen
        for step in self.resolution.trace:
            mark = "*" if chosen and step.candidate == chosen.name else " "
            lines.append(f" {mark} {step}")
        lines += [f" - {step}" for step in self.left_out]
        if chosen is None:
            lines.append("no kernel takes this call; nothing was tried, nothing was copied")
            if not self.resolution.trace:
                lines.append("no backend is installed for this device: `glm5-hal doctor` lists what is there")
            if "UNAVAILABLE" in {getattr(step.decision, "code", "") for step in self.resolution.trace}:
                lines.append("add arch=, the name of an architecture, to hear what kernels would say on such a device")
        return "\n".join(lines)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which kernel would serve a call, and why each candidate is or is not taken.

    Args:
        op: the op's name.
        args, kwargs: the call itself, with tensors; or no tensors, and then any of the op's scalars and axes by name
            (``explain("topk_indices", top_k=4096, T=64, S=131072)``), ``dtype`` and ``device``. What is left out
            comes from the op's first sample (of those with the given ``cache_format`` or other named choice), the
            device from the first backend that the policy names. With ``arch`` the devices need not be there: the
            kernels answer as on one of that architecture which has every feature.

    Raises:
        HalError: UNKNOWN for an op or a name that it does not have; what the op itself would raise for bad metadata.
    """
    spec, arch = declared(op), ""
    policy, require, _ = context.effective()
    targets = policy.targets(op)
    catalogue: Catalogue = context.catalogue()
    if args or any(name in spec.tensors for name in kwargs):
        from glm5_hal.dispatch import op_named

        call = op_named(op).describe(*args, **kwargs)
    else:
        changes = {"device": _device_of(targets, catalogue), **kwargs}
        arch = str(changes.pop("arch", ""))
        call = described(spec, changes)
    if arch:
        catalogue = Supposed(context.catalogue(), arch)
    found = resolve(spec, call, catalogue, targets, require, exhaustive=True)
    others = tuple(left_out(spec, call, catalogue, targets, outside=True))
    return Explanation(call, policy.text, policy.provenance, found, others, arch)


def _device_of(targets: Sequence[Target], catalogue: Catalogue) -> str:
    """Where the tensors are of whoever names these backends; on the CPU where none is named."""
    entries = (entry for target in targets if target.backend != "auto" for entry in catalogue.named(target.backend))
    return next((entry.backend.device_type for entry in entries if entry.backend is not None), "cpu")


def described(spec: OpSpec, changes: Mapping[str, Any]) -> Signature:
    """A signature from axes, scalars, ``dtype`` and ``device``; the rest as in the op's first sample."""
    changes = dict(changes)
    device = changes.pop("device", "cpu")
    if not isinstance(device, str):
        raise HalError(
            "DEVICE", f"device {device!r} is not a device's name", value=device, fix="write it as torch does: 'cpu'"
        )
    args = _example(spec, changes)
    scalars = {s.name: args[s.name] for s in spec.scalars}
    axes = bind_axes(spec, {n: None if args[n] is None else tuple(args[n].shape) for n in spec.tensors}, scalars)
    settable = {**{k: v for k, v in axes.items() if k != "..."}, **scalars}
    for name, value in changes.items():
        if name not in settable:
            known = [*settable, "dtype", "device", "arch"]
            raise HalError(
                "UNKNOWN", f"{spec.name} has no axis or scalar {name!r}", value=name, fix=suggest(name, known)
            )
        if name not in scalars and (type(value) is not int or value < 0):
            raise HalError(
                "SHAPE", f"{spec.name}: axis {name} is {value!r}", value=value, fix="an axis is an integer from 0"
            )
    axes |= {k: v for k, v in changes.items() if k in axes}
    scalars |= {k: v for k, v in changes.items() if k in scalars}
    metas: dict[str, TensorMeta | None] = {}
    for arg in spec.args:
        if args[arg.name] is None:
            metas[arg.name] = None
            continue
        metas[arg.name] = TensorMeta(str(args[arg.name].dtype)[6:], shape_of(arg.dims, axes), device)
    return signature_of(spec, metas, scalars)


def _example(spec: OpSpec, changes: dict[str, Any]) -> Mapping[str, Any]:
    """Arguments of the first sample; of the first small one that has a choice by name, such as a cache format. Takes
    ``dtype`` out of the changes."""
    from glm5_hal.conformance.inputs import Draw

    samples = [s for s in spec.samples() if s.level == "smoke"] or list(spec.samples())
    dtype = changes.pop("dtype", samples[0].dtypes[0])
    allowed = dict.fromkeys(d for variable in spec.dtypes.values() for d in variable)
    if dtype not in allowed:
        raise HalError("DTYPE", f"{spec.name} takes no {dtype}", value=dtype, fix=f"one of {', '.join(allowed)}")
    choices = {k: v for k, v in changes.items() if isinstance(v, str)}
    first = None
    for sample in samples:
        args = spec.inputs(sample, dtype, Draw(0, spec.name)).args
        if all(args.get(name) == value for name, value in choices.items()):
            return args
        first = args if first is None else first
    assert first is not None  # every op has a sample
    return first
