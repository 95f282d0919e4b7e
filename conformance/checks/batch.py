"""A row's bits do not depend on the other rows of the batch, where the kernel claims ``batch_invariant``.

The batch is taken apart: every request alone, and its last token alone; or the last row of every expert; or, where
there are neither, the first token, the last one, and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Finding, Trial, same_bits
from glm5_hal.errors import HalError


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, as a call of its own."""

    what: str
    rows: Tensor
    args: Mapping[str, Any]


def check(trial: Trial) -> Finding:
    if "batch_invariant" not in trial.kernel.provides:
        return Finding(None, "the kernel does not claim batch_invariant")
    taken = 0
    for part in parts(trial):
        try:
            run = trial.run(part.args)
        except HalError as refusal:
            if refusal.code == "KERNEL":
                raise
            continue  # the op or the kernel does not take a batch of this size
        taken += 1
        different = _difference(trial, run, part)
        if different:
            return Finding(False, f"{part.what} alone: {different}")
    return Finding(True) if taken else Finding(None, "the batch cannot be taken apart")


def parts(trial: Trial) -> Iterator[Part]:
    """What the batch of a case can be cut into: nothing where its outputs are not one row per row of an input."""
    spec, args = trial.spec, trial.inputs.args
    leads = {a.name: a.dims.split()[0] for a in spec.args if args[a.name] is not None}
    rows = {o.dims.split()[0] for o in spec.outs} or {"T"}
    if len(rows) != 1 or not rows <= set(leads.values()):
        return
    if "cu_seqlens_q" in leads:
        yield from _requests(args, leads)
    elif "expert_offsets" in leads:
        yield from _experts(args, leads, *rows)
    else:
        yield from _tokens(args, leads, *rows)


def _requests(args: Mapping[str, Any], leads: Mapping[str, str]) -> Iterator[Part]:
    queries = args["cu_seqlens_q"].tolist()
    keys = args["cu_seqlens_k"].tolist() if "cu_seqlens_k" in leads else queries
    for r, (start, stop) in enumerate(pairwise(queries)):
        for what, first in ((f"request {r}", start), (f"the last token of request {r}", stop - 1)):
            if start <= first < stop:
                lengths = {"cu_seqlens_q": stop - first, "cu_seqlens_k": keys[r + 1] - keys[r]}
                cuts = {"T": slice(first, stop), "S": slice(keys[r], keys[r + 1]), "B": slice(r, r + 1)}
                cut = {name: args[name][cuts[lead]] for name, lead in leads.items() if lead in cuts}
                cut |= {name: args[name].new_tensor([0, n]) for name, n in lengths.items() if name in leads}
                yield Part(what, torch.arange(first, stop), {**args, **cut})


def _experts(args: Mapping[str, Any], leads: Mapping[str, str], axis: str) -> Iterator[Part]:
    offsets = args["expert_offsets"]
    some = offsets.diff() > 0
    rows = (offsets[1:] - 1)[some].long()
    if len(rows):
        cut = {name: args[name][rows] for name, lead in leads.items() if lead == axis}
        ends = torch.cat([offsets.new_zeros(1), some.cumsum(0, dtype=offsets.dtype)])
        yield Part("the last row of every expert", rows, {**args, **cut, "expert_offsets": ends})


def _tokens(args: Mapping[str, Any], leads: Mapping[str, str], axis: str) -> Iterator[Part]:
    along = [name for name, lead in leads.items() if lead == axis and args[name].dim() > (axis == "...")]
    count = min((len(args[name]) for name in along), default=0)
    all_rows = torch.arange(count)
    for what, rows in (("first token", all_rows[:1]), ("last token", all_rows[-1:]), ("middle", all_rows[1:-1])):
        if len(rows) and count > 1:
            yield Part(f"the {what}", rows, {**args, **{name: args[name][rows] for name in along}})


def _difference(trial: Trial, run: Run, part: Part) -> str | None:
    for name, alone in run.outs.items():
        if not same_bits(alone, trial.first.outs[name][part.rows]):
            return f"{name} has other bits than in the batch"
    for name, alone in run.mutated.items():
        before, together, own = (
            t.contiguous().view(torch.uint8) for t in (trial.inputs.args[name], trial.first.mutated[name], alone)
        )
        if ((own != before) & (own != together)).any():
            return f"{name} has other bits than after the batch"
    return None
