"""A NaN or an infinity in one token's inputs reaches that token's results, and no other row.

The reference, given the same, says which rows a value reaches, from keys and caches too: what it leaves alone must be
as good as before, and where the token's own results are NaN there must be no number. What else is in a row that is
reached is its own affair: a kernel may spread it further there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance import oracle
from glm5_hal.conformance.checks.accuracy import judge
from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Finding, Trial
from glm5_hal.spec import BitExact, Given, Selection

VALUES = (float("nan"), float("inf"))


def check(trial: Trial) -> Finding:
    if not trial.case.elected:
        return Finding(None, "looked at in one dtype of each small sample")
    applied = False
    for value in VALUES:
        args, where = _spoilt(trial, value)
        if not where:
            continue
        applied = True
        finding = _judge(trial, args, oracle.truth(trial.spec, args), value)
        if finding.failed:
            return replace(finding, detail=f"with {value} in {', '.join(where)}: {finding.detail}")
    return Finding(True) if applied else Finding(None, "no floating-point input has rows")


def _spoilt(trial: Trial, value: float) -> tuple[dict[str, Any], list[str]]:
    """The inputs with ``value`` in one element of every per-row argument, in different rows, where it is read."""
    args, where = dict(trial.inputs.args), []
    for turn, arg in enumerate(_per_row(trial)):
        given, unread = args[arg], trial.inputs.poison.get(arg)
        read = torch.ones(given.shape, dtype=torch.bool) if unread is None else ~unread
        rows = read.flatten(1).all(1).nonzero().flatten()
        if len(rows) < 2:
            continue
        row = int(rows[(len(rows) // 2 + turn) % len(rows)])
        at = (row, *(n // 2 for n in given.shape[1:]))
        args[arg] = given.clone()
        args[arg][at] = value
        where.append(f"{arg}{list(at)}")
    return args, where


def _per_row(trial: Trial) -> list[str]:
    """Floating-point arguments of which a row is a token's, a key's or a page's own; not those that serve all rows."""
    leads = {"T", "S", "N", "M", "..."}
    args, written = trial.inputs.args, trial.spec.mutates
    per_row = [a.name for a in trial.spec.args if a.dims.split()[0] in leads and a.name not in written]
    given = {n: args[n] for n in per_row if args[n] is not None}
    return [n for n, t in given.items() if t.is_floating_point() and t.numel() and t.dim() > 1]  # a vector has no rows


def _judge(trial: Trial, args: Mapping[str, Any], spoilt: Run, value: float) -> Finding:
    run, truth, outs = trial.run(args), trial.expected.truth, {}
    own = {out.name: _own_rows(trial, args, out.dims.split()[0]) for out in trial.spec.outs}
    for name, y in spoilt.outs.items():
        touched = (y != truth.outs[name]).flatten(1).any(1) if y.dim() > 1 else y != truth.outs[name]
        found = own[name]
        mine = torch.zeros_like(touched) if found is None else found
        touched = touched | mine
        outs[name] = torch.where(_wide(touched, y), trial.first.outs[name], run.outs[name])
        rule = trial.spec.accuracy[name]
        reached = torch.ones_like(y, dtype=torch.bool) if isinstance(rule, BitExact) else _wide(mine, y)
        if isinstance(rule, Selection) and (odd := _no_choice(name, rule, args, run.outs[name], touched)):
            return Finding(False, odd)
        judged = y.is_floating_point() and not isinstance(rule, Given)  # which follows from what was selected
        if judged and (lost := _lost(name, y, run.outs[name], reached, value)):
            return Finding(False, lost)
    mutated = {}
    for name, y in spoilt.mutated.items():
        same = (y == truth.mutated[name]) | (y.isnan() & truth.mutated[name].isnan())
        mutated[name] = torch.where(same, run.mutated[name], trial.first.mutated[name])
        if y.is_floating_point() and (lost := _lost(name, y, run.mutated[name], ~same, value)):
            return Finding(False, lost)
    return judge(trial, Run(outs, mutated))


def _own_rows(trial: Trial, args: Mapping[str, Any], lead: str) -> Tensor | None:
    """Which rows of an output belong to a row of an input that is not finite; None if none can."""
    rows = [n for n in _per_row(trial) if trial.spec.tensors[n].dims.split()[0] == lead]
    spoilt = [(~args[n].isfinite()).flatten(1).any(1) for n in rows]
    return torch.stack(spoilt).any(0) if spoilt else None


def _no_choice(name: str, rule: Selection, args: Mapping[str, Any], chosen: Tensor, rows: Tensor) -> str:
    """What is wrong with indices [T, K] of these rows, whatever the scores: others read by them."""
    width, least = rule.scores(args)[0].shape[1], -1 if rule.padded else 0
    for row in rows.nonzero().flatten().tolist():
        mine = chosen[row].tolist()
        beyond = [i for i in mine if not least <= i < width]
        taken = [i for i in mine if i >= 0]
        if beyond or len(set(taken)) < len(taken):
            said = f"{beyond[0]} is none of {width}" if beyond else "one is there twice"
            return f"{name}[{row}] is no choice: {said}"
    return ""


def _lost(name: str, y: Tensor, x: Tensor, mine: Tensor, value: float) -> str:
    """Where x has a number and the reference a NaN; or rows where an infinity should be, and all is finite."""
    lost = y.isnan() & x.isfinite() if value != value else ~y.isfinite() & x.isfinite().all(-1, keepdim=True)
    lost = lost & mine
    if not lost.any():
        return ""
    at = lost.nonzero()[0].tolist()
    return f"{name}{at} is the number {x[tuple(at)]}: it was lost on its way"


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.dim() - 1)).expand(like.shape)
