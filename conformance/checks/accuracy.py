"""Every output against the float64 oracle, each judged as its op declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from glm5_hal.conformance import compare, selecting
from glm5_hal.conformance.calibrated import calibrated
from glm5_hal.conformance.compare import Judgement
from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.rounding import unit_roundoff
from glm5_hal.conformance.trial import Finding, Trial
from glm5_hal.formats import FORMATS, CacheFormat
from glm5_hal.ops._common import caches
from glm5_hal.spec import (
    AbsoluteError,
    Accuracy,
    BitExact,
    CacheContents,
    Calibrated,
    Given,
    Selection,
)

#: What a strictly sequential fp32 sum over n terms may lose, in units of its roundoff, is about sqrt(n) (measured:
#: 0.4 on random signs, 0.6 on equal ones); twice that is the floor of every budget.
SEQUENTIAL = 2.0 * 2.0**-24

#: The same for float64, of which the oracle itself is made and so tells no more than this: that nothing was computed
#: in less.
SEQUENTIAL_DOUBLE = 2.0**-42

#: What a few fp32 operations on numbers of a row's size may cost, where sums are exact.
NOISE = 8.0 * 2.0**-24


def check(trial: Trial) -> Finding:
    finding, nothing = judge(trial, trial.first), _says_nothing(trial)
    return replace(finding, ok=False, detail=nothing, mistrusted=True) if finding.ok and nothing else finding


def proves_nothing(trial: Trial) -> bool:
    """Whether a kernel that passed this trial would have proved nothing. Asks no kernel."""
    return judge(trial, trial.expected.honest).mistrusted or bool(_says_nothing(trial))


def _says_nothing(trial: Trial) -> str:
    truth = trial.expected.truth
    empty = "empty" in trial.case.sample.tags  # zero everywhere is the right answer there
    return "" if empty else compare.mistrusted(*truth.outs.values(), *truth.mutated.values())


def judge(trial: Trial, run: Run) -> Finding:
    """Judge a run's outputs and mutated arguments; the first failure is the finding, all numbers are kept."""
    errors: dict[str, float] = {}
    budget: dict[str, float] = {}
    problem, mistrusted = "", ""
    for name, rule in trial.spec.accuracy.items():
        if name in trial.spec.mutates and trial.inputs.args[name] is None:
            continue
        verdict = _judge_one(trial, run, name, rule)
        errors |= {f"{name}.{k}": v for k, v in verdict.errors.items()}
        budget |= {f"{name}.{k}": v for k, v in verdict.budget.items()}
        said = f"{name}: {verdict.detail}"
        if verdict.mistrusted:
            mistrusted = mistrusted or said
        elif not verdict.ok:
            problem = problem or said
    return Finding(not (problem or mistrusted), problem or mistrusted, errors, budget, bool(mistrusted and not problem))


def _judge_one(trial: Trial, run: Run, name: str, rule: Accuracy) -> Judgement:
    args, truth, honest = trial.inputs.args, trial.expected.truth, trial.expected.honest
    if isinstance(rule, CacheContents):
        return _cache_contents(trial, run, name, rule)
    x = run.outs[name] if name in run.outs else run.mutated[name]
    y = truth.outs[name] if name in truth.outs else truth.mutated[name]
    b = honest.outs[name] if name in honest.outs else honest.mutated[name]
    if isinstance(rule, BitExact):
        return compare.bit_exact(x, y.to(b.dtype))
    if trial.case.sample.fill == "exact" and isinstance(rule, Calibrated):
        return _exact_fill(x, y, y.to(b.dtype))
    if isinstance(rule, Selection):
        scores, tau = rule.scores(args)
        claims = trial.kernel.provides
        return selecting.selection(
            x,
            scores,
            tau,
            canonical="canonical_ties" in claims and (trial.case.sample.fill == "exact" or _is_zero(tau)),
            sorted_="sorted_indices" in claims,
            padded=rule.padded,
        )
    if isinstance(rule, Given):
        y = rule.expected(args, tuple(run.outs.values()))
        b = y.to(x.dtype)
        floor = _floor(trial, rule.depth, None, _name(x))
        return calibrated(x, y, b, unit=unit_roundoff(_name(x)), floor=floor)
    floor = _floor(trial, rule.depth, rule.amplify, _name(b))
    if isinstance(rule, AbsoluteError):
        return compare.absolute(x, y, b, unit=unit_roundoff(_name(b)), floor=floor)
    return calibrated(x, y, b, unit=unit_roundoff(_name(b)), floor=floor, row_dims=rule.row_dims)


def _exact_fill(x: torch.Tensor, y: torch.Tensor, rounded: torch.Tensor) -> Judgement:
    """The bits of the rounded truth, or values that differ from them by fp32 noise alone: a softmax that is normalised
    tile by tile divides by other numbers than one over all keys. In a narrower dtype that shows at ties only."""
    strict = compare.bit_exact(x, rounded)
    if strict.ok or x.dtype != rounded.dtype or x.shape != y.shape:
        return strict
    beyond = (x.double() - y).abs() - (rounded.double() - y).abs()
    shares = torch.where(beyond <= 0, 0.0, beyond / (NOISE * y.abs().amax(-1, keepdim=True)))
    noise = shares.max().item()
    return Judgement(True, {"noise": noise}, {"noise": 1.0}) if noise <= 1 else strict


def _cache_contents(trial: Trial, run: Run, name: str, rule: CacheContents) -> Judgement:
    """The written rows, read back as numbers; and every other byte as it was."""
    args = trial.inputs.args
    fmt = FORMATS[args["cache_format"]]
    if name != fmt.tensors[0]:
        return Judgement(True, {}, {}, "")  # judged together with the format's first tensor
    slots = args["slot_mapping"][args["slot_mapping"] >= 0]
    for tensor in fmt.tensors:
        stray = _stray_write(args[tensor], run.mutated[tensor], caches.written(fmt, args, slots, tensor))
        if stray:
            return Judgement(False, {}, {}, f"{tensor} was written outside slot_mapping: {stray}")
    if fmt.group:
        scale, true = (_scales(fmt, r.mutated[name], slots, args) for r in (run, trial.expected.truth))
        other = int((scale != true).sum())
        # A maximum that is rounded otherwise may reach the next power of two, now and then.
        if not (torch.frexp(scale).mantissa == 0.5).all() or other > 1 + scale.numel() // 8:
            return Judgement(
                False, {}, {}, f"{other} of {scale.numel()} scales are not the power of two of their group"
            )
    x, y, b = (
        _rows(fmt.name, {t: r.mutated[t] for t in fmt.tensors}, slots, args)
        for r in (run, trial.expected.truth, trial.expected.honest)
    )
    stored = "bfloat16" if fmt.group else _name(args[name])
    floor = _floor(trial, rule.depth, None, stored) + (caches.flip_floor(y.shape[-1]) if fmt.group else 0.0)
    return calibrated(x, y, b, unit=unit_roundoff(stored), floor=floor)


def _rows(fmt: str, tensors: Mapping[str, torch.Tensor], slots: torch.Tensor, args: Mapping[str, Any]) -> torch.Tensor:
    latent, rope = caches.read_exact(
        FORMATS[fmt], tuple(tensors.values()), slots, caches.latent_dim(FORMATS[fmt], args)
    )
    return latent if rope is None else torch.cat([latent, rope], -1)


def _scales(fmt: CacheFormat, cache: torch.Tensor, slots: torch.Tensor, args: Mapping[str, Any]) -> torch.Tensor:
    """The fp32 scales [n, groups] of rows of a quantised cache."""
    scale = caches.fields(fmt, (cache,), caches.latent_dim(fmt, args))["scale"]
    return scale[slots // cache.shape[1], slots % cache.shape[1]].view(torch.float32)


def _stray_write(before: torch.Tensor, after: torch.Tensor, written: torch.Tensor) -> str | None:
    changed = (before.contiguous().view(torch.uint8) != after.contiguous().view(torch.uint8)).view(*before.shape, -1)
    stray = (changed.any(-1) & ~written).nonzero()
    return f"{len(stray)} elements, the first at {stray[0].tolist()}" if len(stray) else None


def _floor(trial: Trial, depth: tuple[str, ...], amplify: Any, dtype: str) -> Any:
    """What the order of accumulation may cost: see SEQUENTIAL."""
    terms = sum(trial.axes[axis] for axis in depth)
    base = (SEQUENTIAL_DOUBLE if dtype == "float64" else SEQUENTIAL) * max(terms, 1) ** 0.5
    return base if amplify is None else base * amplify(trial.inputs.args)


def _is_zero(tau: Any) -> bool:
    return not bool(torch.as_tensor(tau).any())


def _name(t: torch.Tensor) -> str:
    return str(t.dtype)[6:]
