"""Other memory layouts of the same values: gaps between rows, an odd offset, the last two dims swapped in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from glm5_hal.capability import Accepted, TensorMeta
from glm5_hal.conformance.checks.accuracy import judge
from glm5_hal.conformance.trial import Finding, Trial


def check(trial: Trial) -> Finding:
    refused = []
    for label, relaid in LAYOUTS.items():
        args = dict(trial.inputs.args)
        names = [a.name for a in trial.spec.args if a.layout != "contiguous" and args[a.name] is not None]
        for arg in trial.spec.args:
            if arg.name in names:
                args[arg.name] = _pages_apart(args[arg.name]) if arg.layout == "page" else relaid(args[arg.name])
        reason = _refusal(trial, args)
        if reason:
            refused.append(f"{label}: {reason}")
            continue
        finding = judge(trial, trial.run(args))
        if not finding.ok:
            return Finding(False, f"layout {label}: {finding.detail}")
    return Finding(True, "; ".join(refused)) if len(refused) < len(LAYOUTS) else Finding(None, "; ".join(refused))


def _gaps(t: torch.Tensor) -> torch.Tensor:
    """A slice of a wider tensor: what lies between the rows is garbage."""
    if t.dim() == 0:
        return t
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 3), 77)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def _offset(t: torch.Tensor) -> torch.Tensor:
    """Starts one element into its memory, so nothing is aligned."""
    flat = t.new_full((t.numel() + 1,), 77)
    flat[1:] = t.reshape(-1)
    return flat[1:].view(t.shape)


def _swapped(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() >= 2 else t


def _pages_apart(cache: torch.Tensor) -> torch.Tensor:
    """Each page contiguous, pages further apart than they need be: one more row between them."""
    wide = cache.new_full((cache.shape[0], cache.shape[1] + 1, *cache.shape[2:]), 77)
    wide[:, :-1] = cache
    return wide[:, :-1]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gaps": _gaps, "offset": _offset, "swapped": _swapped}


def _refusal(trial: Trial, args: dict[str, object]) -> str | None:
    """Why the kernel declares that it does not take this layout, if it does."""
    from glm5_hal import ops

    call = getattr(ops, trial.spec.name).describe(**args)
    metas: dict[str, TensorMeta | None] = dict(call.tensors)
    for requirement in trial.kernel.requires:
        if any(what == "strides" and name in metas for name, what in requirement.reads):
            decision = requirement.test(call, trial.facts)
            if not isinstance(decision, Accepted):
                return str(decision)
    return None
