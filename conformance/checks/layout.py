"""Other memory layouts of the same values: gaps between rows, an odd offset, the last two dims swapped in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from glm5_hal.capability import Accepted
from glm5_hal.conformance.checks.accuracy import judge
from glm5_hal.conformance.checks.integrity import stray_writes
from glm5_hal.conformance.trial import Finding, NotTakenError, Trial
from glm5_hal.signature import TensorMeta


def check(trial: Trial) -> Finding:
    refused, ran = [], False
    for label, relaid in LAYOUTS.items():
        args, reasons = _accepted(trial, relaid)
        refused += [f"{label}: {reason}" for reason in reasons]
        if args is None:
            continue
        placed = trial.place(args)
        try:
            run = trial.bring_back(trial.attempt(**placed), placed)
        except NotTakenError as refusal:
            refused.append(f"{label}: {refusal}")
            continue
        ran, finding, stray = True, judge(trial, run), stray_writes(placed)
        if not finding.ok or stray:
            return replace(finding, ok=False, detail=f"layout {label}: {finding.detail or stray}")
    return Finding(ran or None, "; ".join(dict.fromkeys(refused)))


def _gaps(t: torch.Tensor) -> torch.Tensor:
    """A slice of a wider tensor."""
    return t if t.dim() == 0 else t.new_empty((*t.shape[:-1], t.shape[-1] + 3))[..., : t.shape[-1]].copy_(t)


def _offset(t: torch.Tensor) -> torch.Tensor:
    """Starts one element into its memory, so nothing is aligned."""
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def _swapped(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() >= 2 else t


def _pages_apart(cache: torch.Tensor) -> torch.Tensor:
    """Each page contiguous, pages further apart than they need be: one more row between them."""
    return cache.new_empty((cache.shape[0], cache.shape[1] + 1, *cache.shape[2:]))[:, :-1].copy_(cache)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gaps": _gaps, "offset": _offset, "swapped": _swapped}


def _accepted(trial: Trial, relaid: Callable[[torch.Tensor], torch.Tensor]) -> tuple[dict[str, Any] | None, list[str]]:
    """The arguments relaid as far as the kernel takes them so (None: not at all), and what it declares against it."""
    from glm5_hal import ops

    op, args, reasons = getattr(ops, trial.spec.name), dict(trial.inputs.args), []
    changed = {a.name: a for a in trial.spec.args if a.layout != "contiguous" and args[a.name] is not None}
    for name, arg in changed.items():
        args[name] = _pages_apart(args[name]) if arg.layout == "page" else relaid(args[name])
    for requirement in trial.kernel.requires:
        call = op.describe(**args)
        metas: dict[str, TensorMeta | None] = dict(call.tensors)
        asked = {name for name, what in requirement.reads if what == "strides" and metas.get(name)}
        if asked and not isinstance(decision := requirement.test(call, trial.facts), Accepted):
            reasons.append(str(decision))
            for name in asked & changed.keys():
                args[name] = trial.inputs.args[name]
                del changed[name]
    return (args if changed else None), reasons
