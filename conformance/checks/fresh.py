"""What a call returned and wrote stays as it is when the next call, on other numbers, has run."""

from __future__ import annotations

from glm5_hal.conformance.checks.agreement import first_difference
from glm5_hal.conformance.trial import Finding, Trial


def check(trial: Trial) -> Finding:
    if trial.other is None:
        return Finding(None, "this sample has no other inputs of the same shapes")
    (placed, returned), before = trial.raw, trial.first
    trial.call(**trial.place(trial.other))
    different = first_difference(before, trial.bring_back(returned, placed))
    return Finding(different is None, f"a later call changed {different}" if different else "")
