"""A row's result does not depend on the other rows of the batch: bit by bit where the kernel claims
``batch_invariant``, else it is as accurate.

The batch is taken apart: every request alone, and its last token alone; or the last row of every expert; or, where
there are neither, the first token, the last one, and the rest. Then it is put together otherwise: backwards, and with
some of it twice, as where a server pads a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.checks.accuracy import judge
from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Finding, NotTakenError, Trial, same_bits
from glm5_hal.formats import FORMATS
from glm5_hal.ops._common import caches


@dataclass(frozen=True)
class Part:
    """Rows of a batch (some perhaps twice, in any order), as a call of its own."""

    what: str
    rows: Tensor
    args: Mapping[str, Any]


def check(trial: Trial) -> Finding:
    claimed, taken = "batch_invariant" in trial.kernel.provides, 0
    if not claimed and not trial.case.elected:
        return Finding(None, "the kernel does not claim batch_invariant; accuracy is looked at in one dtype per sample")
    for part in parts(trial):
        placed = trial.place(part.args)
        try:
            run = trial.bring_back(trial.attempt(**placed), placed)
        except NotTakenError:
            continue  # a batch of this size
        taken += 1
        different = _stray(trial, run, part) or (_difference(trial, run, part) if claimed else None)
        if different:
            return Finding(False, f"{part.what}: {different}")
        for copies in [] if claimed else _once_each(part.rows):
            finding = judge(trial, _put_back(trial, run, part, copies))
            if finding.failed:
                return replace(finding, detail=f"{part.what}: {finding.detail}")
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
    queries = list(pairwise(args["cu_seqlens_q"].tolist()))
    everything = [(r, start) for r, (start, _) in enumerate(queries)]
    for r, (start, stop) in enumerate(queries):
        for what, first in ((f"request {r} alone", start), (f"the last token of request {r} alone", stop - 1)):
            if start <= first < stop:
                yield _request_part(what, args, leads, [(r, first)])
    if len(queries) > 1 and len(args["q"]):
        yield _request_part("requests backwards", args, leads, everything[::-1])
        yield _request_part("a request twice", args, leads, [*everything, everything[0]])


def _request_part(
    what: str, args: Mapping[str, Any], leads: Mapping[str, str], chosen: Sequence[tuple[int, int]]
) -> Part:
    """Requests in this order, each from this token of the batch on."""
    queries = args["cu_seqlens_q"].tolist()
    keys = args["cu_seqlens_k"].tolist() if "cu_seqlens_k" in leads else queries
    gathered = {
        "T": torch.cat([torch.arange(first, queries[r + 1]) for r, first in chosen]),
        "S": torch.cat([torch.arange(keys[r], keys[r + 1]) for r, _ in chosen]),
        "B": torch.tensor([r for r, _ in chosen]),
    }
    lengths = {
        "cu_seqlens_q": [queries[r + 1] - first for r, first in chosen],
        "cu_seqlens_k": [keys[r + 1] - keys[r] for r, _ in chosen],
    }
    cut = {name: args[name][gathered[lead]] for name, lead in leads.items() if lead in gathered}
    cut |= {n: torch.tensor([0, *of]).cumsum(0).to(args[n].dtype) for n, of in lengths.items() if n in leads}
    return Part(what, gathered["T"], {**args, **cut})


def _experts(args: Mapping[str, Any], leads: Mapping[str, str], axis: str) -> Iterator[Part]:
    offsets = args["expert_offsets"]
    some = offsets.diff() > 0
    rows = (offsets[1:] - 1)[some].long()
    if len(rows):
        cut = {name: args[name][rows] for name, lead in leads.items() if lead == axis}
        ends = torch.cat([offsets.new_zeros(1), some.cumsum(0, dtype=offsets.dtype)])
        yield Part("the last row of every expert alone", rows, {**args, **cut, "expert_offsets": ends})


def _tokens(args: Mapping[str, Any], leads: Mapping[str, str], axis: str) -> Iterator[Part]:
    along = [name for name, lead in leads.items() if lead == axis and args[name].dim() > (axis == "...")]
    count = min((len(args[name]) for name in along), default=0)
    rows = torch.arange(count)
    ways = {
        "the first token alone": rows[:1],
        "the last token alone": rows[-1:],
        "the middle alone": rows[1:-1],
        "tokens backwards": rows.flip(0),
        "tokens twice": torch.cat([rows, rows[: 1 + count // 2]]),
    }
    for what, chosen in ways.items():
        if len(chosen) and count > 1:
            cut = {name: args[name][chosen] for name in along}
            if "slot_mapping" in cut:  # a slot is written once
                cut["slot_mapping"][count:] = -1
            yield Part(what, chosen, {**args, **cut})


def _once_each(rows: Tensor) -> Iterator[Tensor]:
    """Places in ``rows`` of each row's first copy, then of each second one, and so on."""
    seen = Counter[int]()
    turn = torch.tensor([seen.update([row]) or seen[row] for row in rows.tolist()], dtype=torch.int64)
    for n in range(1, int(turn.max()) + 1 if len(turn) else 1):
        yield (turn == n).nonzero().flatten()


def _put_back(trial: Trial, run: Run, part: Part, copies: Tensor) -> Run:
    """The judged run with these rows in place of its own, so that they have the budget of the whole batch."""
    rows = part.rows[copies]
    outs = {name: own.index_copy(0, rows, run.outs[name][copies]) for name, own in trial.first.outs.items()}
    mutated = {
        name: torch.where(_written(part, name), run.mutated[name], together)
        for name, together in trial.first.mutated.items()
    }
    return Run(outs, mutated)


def _stray(trial: Trial, run: Run, part: Part) -> str | None:
    for name, alone in run.mutated.items():
        if not same_bits(torch.where(_written(part, name), trial.inputs.args[name], alone), trial.inputs.args[name]):
            return f"{name} was written outside slot_mapping"
    return None


def _difference(trial: Trial, run: Run, part: Part) -> str | None:
    for name, alone in run.outs.items():
        if not same_bits(alone, trial.first.outs[name][part.rows]):
            return f"{name} has other bits than in the batch"
    for name, alone in run.mutated.items():
        together = torch.where(_written(part, name), trial.first.mutated[name], trial.inputs.args[name])
        if not same_bits(alone, together):
            return f"{name} has other bits than after the batch"
    return None


def _written(part: Part, name: str) -> Tensor:
    """Which elements of a cache the part's tokens write."""
    slots = part.args["slot_mapping"]
    return caches.written(FORMATS[part.args["cache_format"]], part.args, slots[slots >= 0], name)
