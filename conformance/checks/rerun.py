"""The same inputs in fresh memory: the same bits where the kernel claims ``deterministic``, else a result as good.

The last run has NaN in the memory around its inputs, where the others have large numbers: what is read past an end
shows even if it is weighed with 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from glm5_hal.conformance.checks.accuracy import judge
from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Finding, Trial, same_bits

RUNS = 3

#: Bytes that are NaN in every float dtype.
NAN = 0xFF


def check(trial: Trial) -> Finding:
    for again in range(2, RUNS + 1):
        placed = trial.place(trial.inputs.args)
        if again == RUNS:
            for value in placed.values():
                if isinstance(value, torch.Tensor):
                    _surround(value, NAN)
        run = trial.bring_back(trial.call(**placed), placed)
        if "deterministic" in trial.kernel.provides:
            different = first_difference(trial.first, run)
            if different:
                return Finding(False, f"run {again} differs from run 1 in {different}")
        elif not (finding := judge(trial, run)).ok:
            return replace(finding, detail=f"run {again}: {finding.detail}")
    return Finding(True)


def _surround(placed: torch.Tensor, byte: int) -> None:
    """Fill the memory of a `Trial.place`d tensor outside it, gaps included."""
    kept = placed.clone()
    memory = torch.empty(0, dtype=torch.uint8, device=placed.device).set_(placed.untyped_storage())
    memory.fill_(byte)
    placed.copy_(kept)


def first_difference(a: Run, b: Run) -> str | None:
    """Where two runs' bits first differ, in words; None if nowhere."""
    for name in (*a.outs, *a.mutated):
        x, y = (run.outs.get(name, run.mutated.get(name)) for run in (a, b))
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
            return f"{name}: shape or dtype"
        if not same_bits(x, y):
            unequal = (x.contiguous().reshape(-1) != y.contiguous().reshape(-1)).nonzero()
            where = int(unequal[0]) if len(unequal) else 0
            return f"{name} at flat index {where}: {x.reshape(-1)[where]} and {y.reshape(-1)[where]}"
    return None
