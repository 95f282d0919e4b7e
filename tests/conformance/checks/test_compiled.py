"""Every op has one case that is compiled, at level full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trying import failing

from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import cases, find
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args, kernel
from glm5_hal.conformance.mutants.stand_in import NAME, Made, installed
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.target import targets
from glm5_hal.ops import names

NORM = honest.rms_norm()


def judged(body: honest.Body, case_id: str = "rms_norm[float32-compiled]") -> Result:
    with installed(Made("rms_norm", kernel("rms_norm", body), frozenset({"deterministic"}))):
        return next(runner.run(find([case_id]), targets(NAME), 0))


def test_every_op_has_its_case_at_level_full_and_not_below() -> None:
    assert [c.op for c in cases("full") if c.sample.id == "compiled"] == list(names())
    assert not [c for c in cases("standard") if c.sample.id == "compiled"]


def test_an_honest_kernel_passes_and_other_cases_say_where_it_is_looked_at() -> None:
    result = judged(NORM)
    assert (result.verdict, result.checks["compiled"]) == ("PASS", "ok"), result.detail
    other = judged(NORM, "rms_norm[float32-tokens]")
    assert other.checks["compiled"] == "n/a: looked at in rms_norm's case compiled, at level full"


def outside_inference(a: Args) -> Any:
    """Takes another path outside of inference mode, as for training, and a wrong one."""
    return NORM(a) if torch.is_inference_mode_enabled() else NORM(a) * 1.01


def test_another_path_outside_of_inference_mode_is_caught_by_this_check_alone() -> None:
    result = judged(outside_inference)
    assert failing(result) - {"threads"} == {"compiled"}
    assert result.checks["compiled"].startswith("failed: compiled with static shapes: y at flat index 0: ")


def test_a_schema_that_lies_is_caught() -> None:
    def once(a: Args) -> Any:
        if not torch.is_inference_mode_enabled() and a.x.numel():
            y = NORM(a)
            a.x.mul_(1.0).add_(1.0)
            return y
        return NORM(a)

    result = judged(once)
    assert result.checks["compiled"].startswith("failed: opcheck: ")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["add_rms_norm", "mla_cache_write", "moe_experts"])
def test_kernels_of_the_cpu_pass(op: str) -> None:
    (case,) = (c for c in cases("full", (op,)) if c.sample.id == "compiled")
    for result in runner.run([case], [*targets("cpu:torch"), *targets("cpu:reference")], 0):
        assert result.ok, result.detail
        assert result.checks["compiled"] == "ok"
