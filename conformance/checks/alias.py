"""Arguments that lie in one memory: one tensor passed as two arguments that are only read, and all of them in one
buffer. The result is that of separate ones, and shares no memory with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from glm5_hal.conformance.checks import form
from glm5_hal.conformance.checks.accuracy import judge
from glm5_hal.conformance.trial import Finding, NotTakenError, Trial, same_bits


def check(trial: Trial) -> Finding:
    if not trial.case.elected:
        return Finding(None, "looked at in one dtype of each small sample")
    for what, as_first, placed in _placed(trial):
        private = {k: v.to("cpu", copy=True) if isinstance(v, torch.Tensor) else v for k, v in placed.items()}
        try:
            returned = trial.attempt(**placed)
        except NotTakenError:
            continue  # values that the op does not take, as lengths of something else
        problem = form.problem(trial.spec, placed, returned)
        changed = [k for k in placed if k not in trial.spec.mutates and not _same(private[k], placed[k])]
        problem = problem or (f"changed its input {', '.join(changed)}" if changed else "")
        run, judged = trial.bring_back(returned, placed), trial
        if not as_first and not problem:
            judged = trial.on(private)
        finding = judge(judged, run)
        if problem or finding.failed:
            return replace(finding, ok=False, mistrusted=False, detail=f"with {what}: {problem or finding.detail}")
    return Finding(True)


def _placed(trial: Trial) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """What shares memory, whether the values are still the case's own, and the arguments on their device."""
    yield "all arguments in one buffer", True, _in_one_buffer(trial)
    spec, args = trial.spec, trial.inputs.args
    read = [n for n in spec.tensors if n not in spec.mutates and isinstance(args[n], torch.Tensor) and args[n].numel()]
    for a, b in combinations(read, 2):
        one, other = args[a], args[b]
        if (one.shape, one.dtype) == (other.shape, other.dtype) and one.is_floating_point():
            placed = trial.place({**args, b: one})
            yield f"one tensor as {a} and {b}", False, {**placed, b: placed[a]}


def _in_one_buffer(trial: Trial) -> dict[str, Any]:
    """Every tensor a view of one allocation, side by side."""
    args = trial.inputs.args
    tensors = {k: v for k, v in args.items() if isinstance(v, torch.Tensor)}
    starts, end = {}, 0
    for name, t in tensors.items():
        starts[name] = end
        end += -(-t.numel() * t.itemsize // 64) * 64 + 64
    whole = torch.zeros(end, dtype=torch.uint8, device=trial.device)
    views = {}
    for name, t in tensors.items():
        memory = whole[starts[name] :][: t.numel() * t.itemsize]
        views[name] = memory.view(t.dtype).view(t.shape).copy_(t)
    return {**args, **views}


def _same(before: Any, now: Any) -> bool:
    return not isinstance(before, torch.Tensor) or same_bits(before, now.cpu())
