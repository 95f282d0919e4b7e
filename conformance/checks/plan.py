"""A step plan saves syncs and nothing else: the same bits as without it, or as good a result where the kernel does not
claim ``deterministic``."""

from __future__ import annotations

from glm5_hal.conformance.checks.agreement import as_good
from glm5_hal.conformance.trial import Finding, Trial
from glm5_hal.plan import StepPlan


def check(trial: Trial) -> Finding:
    if not {"seq_lens", "cu_seqlens_q"} <= trial.spec.tensors.keys():
        return Finding(None, "the op takes no lengths")
    placed = trial.place(trial.inputs.args)
    with StepPlan.build(placed["seq_lens"], placed["cu_seqlens_q"]).active():
        planned = trial.bring_back(trial.call(**placed), placed)
    return as_good(trial, planned, "with a step plan")
