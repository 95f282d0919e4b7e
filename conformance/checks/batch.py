"""A row's bits do not depend on the other rows of the batch, where the kernel claims ``batch_invariant``.

The batch is taken apart: every request alone, and its last token alone; or, where there are no requests, the first token,
the last one, and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Finding, Trial, same_bits
from glm5_hal.errors import HalError


@dataclass(frozen=True)
class Part:
    """Some tokens of a batch, as a call of its own."""

    what: str
    tokens: slice
    args: Mapping[str, Any]


def check(trial: Trial) -> Finding:
    if "batch_invariant" not in trial.kernel.provides:
        return Finding(None, "the kernel does not claim batch_invariant")
    taken = 0
    for part in parts(trial):
        try:
            run = trial.run(part.args)
        except HalError as refusal:
            if refusal.code not in ("SHAPE", "VALUE", "SCALAR"):
                raise
            return Finding(None, f"the batch cannot be taken apart: {refusal.what}")
        taken += 1
        different = _difference(trial, run, part)
        if different:
            return Finding(False, f"{part.what} alone: {different}")
    return Finding(True) if taken else Finding(None, "the batch cannot be taken apart")


def parts(trial: Trial) -> Iterator[Part]:
    """Cuts of the batch along axis T, and along B where the op has requests."""
    spec, args = trial.spec, trial.inputs.args
    leads = {a.name: a.dims.split()[0] for a in spec.args if args[a.name] is not None and a.dims}
    if any(o.dims.split()[0] not in ("T", "...") for o in spec.outs) or not {"T", "..."} & set(leads.values()):
        return
    if "cu_seqlens_q" in leads:
        yield from _requests(args, leads)
        return
    along = {name: lead for name, lead in leads.items() if lead in ("T", "...") and args[name].dim() > 1 or lead == "T"}
    T = min((len(args[name]) for name in along), default=0)
    for what, tokens in {"the first token": slice(0, 1), "the last token": slice(T - 1, T), "the rest": slice(1, T - 1)}.items():
        if tokens.stop - tokens.start > 0 and T > 1:
            yield Part(what, tokens, {**args, **{name: args[name][tokens] for name in along}})


def _requests(args: Mapping[str, Any], leads: Mapping[str, str]) -> Iterator[Part]:
    offsets = {"T": args["cu_seqlens_q"].tolist(), "S": args["cu_seqlens_k"].tolist() if "cu_seqlens_k" in leads else []}
    for r, (start, stop) in enumerate(zip(offsets["T"], offsets["T"][1:], strict=False)):
        for what, first in {f"request {r}": start, f"the last token of request {r}": stop - 1}.items():
            if first < start or (first == start and what != f"request {r}"):
                continue
            cut = dict(args)
            for name, lead in leads.items():
                if name in ("cu_seqlens_q", "cu_seqlens_k"):
                    low, high = (first, stop) if name == "cu_seqlens_q" else offsets["S"][r : r + 2]
                    cut[name] = args[name].new_tensor([0, high - low])
                elif lead in offsets:
                    cut[name] = args[name][first:stop] if lead == "T" else args[name][slice(*offsets["S"][r : r + 2])]
                elif lead == "B":
                    cut[name] = args[name][r : r + 1]
            yield Part(what, slice(first, stop), cut)


def _difference(trial: Trial, run: Run, part: Part) -> str | None:
    for name, alone in run.outs.items():
        together = trial.first.outs[name][part.tokens]
        if not same_bits(alone, together):
            return f"{name} has other bits than in the batch"
    for name, alone in run.mutated.items():
        before, together = (t.contiguous().view(torch.uint8) for t in (trial.inputs.args[name], trial.first.mutated[name]))
        own = alone.contiguous().view(torch.uint8)
        if ((own != before) & (own != together)).any():
            return f"{name} has other bits than after the batch"
    return None
