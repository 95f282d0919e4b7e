"""A step plan saves syncs and nothing else: the same bits as without it, or as good a result where the kernel does not
claim ``deterministic``."""

from __future__ import annotations

from dataclasses import replace

from glm5_hal.conformance.checks.accuracy import judge
from glm5_hal.conformance.checks.rerun import first_difference
from glm5_hal.conformance.trial import Finding, Trial
from glm5_hal.state import StepPlan


def check(trial: Trial) -> Finding:
    if not {"seq_lens", "cu_seqlens_q"} <= trial.spec.tensors.keys():
        return Finding(None, "the op takes no lengths")
    placed = trial.place(trial.inputs.args)
    with StepPlan.build(placed["seq_lens"], placed["cu_seqlens_q"]).active():
        planned = trial.bring_back(trial.call(**placed), placed)
    if "deterministic" in trial.kernel.provides:
        different = first_difference(trial.first, planned)
        return Finding(different is None, f"with a step plan: {different}" if different else "")
    finding = judge(trial, planned)
    return finding if finding.ok else replace(finding, detail=f"with a step plan: {finding.detail}")
