"""A step plan saves syncs and nothing else: the bits are the same with it as without."""

from __future__ import annotations

from glm5_hal.conformance.checks.rerun import first_difference
from glm5_hal.conformance.trial import Finding, Trial
from glm5_hal.state import StepPlan


def check(trial: Trial) -> Finding:
    if not {"seq_lens", "cu_seqlens_q"} <= trial.spec.tensors.keys():
        return Finding(None, "the op takes no lengths")
    if "deterministic" not in trial.kernel.provides:
        return Finding(None, "the kernel does not claim deterministic")
    placed = trial.place(trial.inputs.args)
    with StepPlan.build(placed["seq_lens"], placed["cu_seqlens_q"]).active():
        planned = trial.bring_back(trial.call(**placed), placed)
    different = first_difference(trial.first, planned)
    return Finding(different is None, f"with a step plan: {different}" if different else "")
