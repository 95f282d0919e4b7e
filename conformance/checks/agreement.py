"""Another run of a kernel against its first one: the same bits where it claims ``deterministic``, else as accurate."""

from __future__ import annotations

from dataclasses import replace

from glm5_hal.conformance.checks.accuracy import judge
from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Finding, Trial, same_bits


def as_good(trial: Trial, run: Run, what: str, bits: bool = True) -> Finding:
    """Whether a run is as good as the trial's own. ``what`` says in a failure how it was made; without ``bits`` it may
    differ in the last bits whatever the kernel claims."""
    where = f"{what}: " if what else ""
    if bits and "deterministic" in trial.kernel.provides:
        different = first_difference(trial.first, run)
        return Finding(different is None, f"{where}{different}" if different else "")
    finding = judge(trial, run)
    return replace(finding, detail=f"{where}{finding.detail}") if finding.detail else finding


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
