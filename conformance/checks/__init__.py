"""The checks, in the order in which they run. Each module has one `check(trial) -> Finding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from glm5_hal.conformance.checks import (
    accuracy,
    alias,
    batch,
    compiled,
    form,
    fresh,
    graph,
    integrity,
    layout,
    nonfinite,
    plan,
    poison,
    provenance,
    rerun,
    threads,
    workspace,
)
from glm5_hal.conformance.trial import Finding, Trial

Check = Callable[[Trial], Finding]

CHECKS: Mapping[str, Check] = {
    "form": form.check,
    "accuracy": accuracy.check,
    "integrity": integrity.check,
    "rerun": rerun.check,
    "fresh": fresh.check,
    "poison": poison.check,
    "layout": layout.check,
    "plan": plan.check,
    "batch": batch.check,
    "workspace": workspace.check,
    "alias": alias.check,
    "nonfinite": nonfinite.check,
    "threads": threads.check,
    "graph": graph.check,
    "compiled": compiled.check,
    "provenance": provenance.check,
}
