"""torch's fused attention as a kernel: within the suite's budgets, and honest where torch's own is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import glm5_hal
from glm5_hal import ops
from glm5_hal.backends.cpu import sdpa
from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import cases
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.target import targets

KERNEL = sdpa.mla_prefill.fn
OFFSETS = torch.tensor([0, 5], dtype=torch.int32)


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given: tuple[torch.Tensor, torch.Tensor] = KERNEL(q, k, v, OFFSETS, OFFSETS, **{"scale": 0.3, **how})
    return given


def test_it_passes_the_suite() -> None:
    chosen = list(cases("smoke", ("mla_prefill",)))
    results: list[Result] = list(runner.run(chosen, targets("cpu:sdpa"), 0))
    assert {r.verdict for r in results if r.dtype != "float64"} == {"PASS"}


@pytest.mark.parametrize("heads", [1, sdpa.HEADS, sdpa.HEADS + 3])
@pytest.mark.parametrize(("keys", "queries"), [(1100, 300), (600, 600), (5, 9), (9, 5)])
def test_groups_of_heads_and_keys_before_the_queries(heads: int, keys: int, queries: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(queries, heads, 24), torch.randn(keys, heads, 24)
    v, cu_q, cu_k = torch.randn(keys, heads, 16), *(torch.tensor([0, n], dtype=torch.int32) for n in (queries, keys))
    out, lse = KERNEL(q, k, v, cu_q, cu_k, scale=0.2)
    with glm5_hal.use("cpu:reference"):
        expected, expected_lse = ops.mla_prefill(q.double(), k.double(), v.double(), cu_q, cu_k, scale=0.2)
    assert torch.allclose(out.double(), expected, atol=2e-6)
    assert torch.allclose(lse.double(), expected_lse, atol=2e-6)


def test_a_query_that_is_no_number_is_not_turned_into_zeros() -> None:
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    q[2, 1, 3] = torch.nan
    out, lse = call(q, k, v)
    assert out[2, 1].isnan().all()
    assert lse[2, 1].isnan()
    assert out[[0, 1, 3, 4]].isfinite().all()
    assert out[2, 0].isfinite().all()


def test_an_lse_of_just_zero_is_left_alone() -> None:
    q, k, v = torch.zeros(1, 1, 8), torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    one = torch.tensor([0, 1], dtype=torch.int32)
    out, lse = KERNEL(q, k, v, one, one, scale=0.3)
    assert lse.item() == 0.0
    assert torch.equal(out, v)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_torch_cannot_mask_with_go_to_another_kernel(scale: float) -> None:
    q = torch.randn(5, 2, 8)
    assert ops.mla_prefill.choose(q, q, q, OFFSETS, OFFSETS, scale=scale).name == "cpu:torch"
    assert ops.mla_prefill.choose(q, q, q, OFFSETS, OFFSETS, scale=0.3).name == "cpu:sdpa"
    assert ops.mla_prefill(q, q, q, OFFSETS, OFFSETS, scale=scale)[1].isfinite().all()
