"""The MoE kernels in plain torch: within the suite's budgets, total orders, and nothing read that must not be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from judging import NeverWaits, arguments, passes, points, run, same_bits, smoke
from torch import Tensor

from glm5_hal import ops
from glm5_hal.backend import Kernel
from glm5_hal.backends._torch import moe
from glm5_hal.backends._torch.moe import grouped_gemm, moe_combine, moe_permute, moe_route
from glm5_hal.conformance import oracle
from glm5_hal.ops import specs
from glm5_hal.ops._common.references import reference_of
from glm5_hal.spec import Sample

KERNELS = (moe_route, moe_permute, grouped_gemm, moe_combine)


@points(*KERNELS)
def test_within_the_budgets_of_the_suite(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@points(moe_combine)
@pytest.mark.usefixtures("far_device")
def test_combining_where_the_host_cannot_count(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@points(moe_combine)
def test_combining_in_many_blocks_of_columns(
    kernel: Kernel, sample: Sample, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "BLOCK", 1)
    passes(kernel, sample, dtype)


@pytest.mark.usefixtures("far_device")
@pytest.mark.parametrize("kernel", [k for k in KERNELS if "graph_safe" in k.provides], ids=lambda k: k.op)
def test_no_kernel_that_claims_graph_safe_waits_for_its_device(kernel: Kernel) -> None:
    for sample in smoke(kernel.op):
        with torch.inference_mode(), NeverWaits():
            kernel.fn(**arguments(kernel.op, sample))


# --- routing ---------------------------------------------------------------------------------------------------------


def route(logits: Any, bias: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    weights, ids = moe_route.fn(torch.as_tensor(logits), bias, **{"top_k": 2, **more})
    return weights, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("values", [1, 2, 3])
def test_the_order_of_ids_is_total(values: int, dtype: torch.dtype) -> None:
    """Equal scores everywhere: what is chosen, and in which order, is what a stable sort gives."""
    draw = torch.Generator().manual_seed(values)
    logits = torch.randint(0, values, (40, 48), generator=draw).to(dtype)
    for groups, kept in ((1, 1), (6, 2)):
        call = {"top_k": 8, "n_group": groups, "topk_group": kept}
        for shift in (0.0, -5.0):  # scores of choice above and below zero
            bias = torch.randint(0, 2, (48,), generator=draw).to(dtype) + shift
            assert torch.equal(route(logits, bias, **call)[1], reference_of("moe_route")(logits, bias, **call)[1])


def test_negative_zero_equals_zero() -> None:
    logits = torch.tensor([[0.0, 0.0, -9.0]])
    bias = torch.tensor([-0.5, -0.5, -0.5])  # sigmoid(0) - 0.5 is 0; the third is below
    assert route(logits, bias)[1].tolist() == [[0, 1]]
    places = moe._best(torch.tensor([[-0.0, 0.0, -1.0, -0.0]]), 3)
    assert places.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_places_order_like_numbers_across_signs_and_sizes(k: int) -> None:
    scores = torch.tensor([[1e-30, -1e-30, 3.0, -3.0, math.inf, -math.inf]])
    assert moe._best(scores, k).tolist() == [[4, 2, 0, 1, 3, 5][:k]]


@pytest.mark.parametrize("groups", [1, 4])
def test_a_row_of_nan_still_names_distinct_experts_and_leaves_the_others_alone(groups: int) -> None:
    logits = torch.randn(3, 16)
    call = {"top_k": 4, "n_group": groups, "topk_group": min(groups, 2)}
    clean = route(logits, **call)
    spoilt = logits.clone()
    spoilt[1] = math.nan
    weights, ids = route(spoilt, **call)
    assert len(set(ids[1].tolist())) == 4
    assert all(0 <= i < 16 for i in ids[1].tolist())
    assert torch.equal(weights[[0, 2]], clean[0][[0, 2]])
    assert torch.equal(ids[[0, 2]], clean[1][[0, 2]])


def test_far_logits_lose_nothing() -> None:
    """Sums of weights near 1e-20, where the divisor's 1e-20 counts, and logits whose exponential overflows."""
    weights, _ = route([[-46.0, -47.0, -48.0]], top_k=3)
    scores = [math.exp(v) for v in (-46.0, -47.0, -48.0)]
    assert weights[0].tolist() == pytest.approx([s / (sum(scores) + 1e-20) for s in scores], rel=1e-5)
    assert route([[-200.0, 200.0]])[0].tolist() == [[1.0, 0.0]]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_a_token_goes_the_same_way_in_any_batch(scoring_func: str) -> None:
    logits, bias = torch.randn(300, 250), torch.randn(250)
    call = {"top_k": 7, "n_group": 5, "topk_group": 2, "scoring_func": scoring_func}
    together = route(logits, bias, **call)
    for some in (slice(0, 1), slice(7, 9), slice(11, 300)):
        for alone, whole in zip(route(logits[some], bias, **call), together, strict=True):
            assert torch.equal(alone, whole[some])


# --- permuting and combining -----------------------------------------------------------------------------------------


def test_more_experts_than_rows_and_no_rows_at_all() -> None:
    for tokens in (0, 1):
        ids = torch.full((tokens, 2), 200, dtype=torch.int32)
        permuted, offsets, inverse = moe_permute.fn(torch.ones(tokens, 3), ids, num_experts=256)
        assert permuted.shape == (2 * tokens, 3)
        assert offsets.tolist() == [0] * 201 + [2 * tokens] * 56
        assert inverse.tolist() == [[0, 1]] * tokens


def test_nan_in_a_token_stays_with_that_token() -> None:
    """Its own result is NaN; nobody else's is, though absent slots are somehow filled and multiplied by zero."""
    y = torch.tensor([[math.nan, math.inf], [1.0, 2.0], [3.0, 4.0]])
    inverse = torch.tensor([[0, -1], [-1, 1], [2, 1], [-1, -1]], dtype=torch.int32)
    for form in (moe._bags, moe._slot_by_slot):
        out = form(y, torch.ones(4, 2), inverse)
        assert out[0].isnan().any() or out[0].isinf().any()
        assert out[1:].tolist() == [[1.0, 2.0], [4.0, 6.0], [0.0, 0.0]]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [moe._bags, moe._slot_by_slot], ids=["bags", "slots"])
def test_a_token_is_combined_to_the_same_bits_in_any_batch(form: Any, dtype: torch.dtype) -> None:
    y, weights = torch.randn(90, 77).to(dtype), torch.rand(33, 8)
    inverse = torch.randint(-1, 90, (33, 8), dtype=torch.int32)
    together = form(y, weights, inverse)
    for some in (slice(0, 1), slice(5, 8), slice(9, 33)):
        assert torch.equal(form(y, weights[some], inverse[some]), together[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_tokens_without_dims_are_combined(dtype: torch.dtype, shared: bool) -> None:
    y, inverse = torch.ones(4, 0, dtype=dtype), torch.zeros(3, 2, dtype=torch.int32)
    extra = torch.ones(3, 0, dtype=dtype) if shared else None
    out = ops.moe_combine(y, torch.ones(3, 2), inverse, extra)
    assert (out.shape, out.dtype) == ((3, 0), dtype)


# --- products --------------------------------------------------------------------------------------------------------


def test_half_precision_accumulates_in_float32() -> None:
    """1 + 2047 · 2^-11 in float16: an accumulator of that type would stay at 1."""
    x = torch.full((1, 2048), 2.0**-11, dtype=torch.float16)
    x[0, 0] = 1.0
    y = grouped_gemm.fn(x, torch.ones(1, 3, 2048, dtype=torch.float16), torch.tensor([0, 1], dtype=torch.int32))
    assert y.tolist() == [[2.0] * 3]  # 1.9995 to the nearest float16


def test_only_experts_with_rows_are_read() -> None:
    weight = torch.full((3, 2, 4), math.nan)
    weight[1] = 1.0
    y = grouped_gemm.fn(torch.ones(2, 4), weight, torch.tensor([0, 0, 2, 2], dtype=torch.int32))
    assert y.tolist() == [[4.0, 4.0]] * 2


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", smoke("moe_experts"), ids=lambda s: s.id)
def test_the_composite_of_these_kernels_is_the_layer(sample: Sample) -> None:
    args, spec = arguments("moe_experts", sample), specs()["moe_experts"]

    class Kernels:
        def __getattr__(self, name: str) -> Any:
            return getattr(moe, name).fn if hasattr(moe, name) else reference_of(name)

    truth = oracle.truth(spec, args).outs["out"]
    out = spec.reference(Kernels(), **args)
    assert ((out - truth).norm(dim=1) <= 2e-6 * truth.norm(dim=1)).all()


def test_routing_and_experts_fit_together() -> None:
    """From logits to tokens through the dispatcher, against one loop in float64."""
    draw = torch.Generator().manual_seed(0)
    T, E, D, I = 9, 12, 32, 20  # noqa: E741
    x, logits = torch.randn(T, D, generator=draw), torch.randn(T, E, generator=draw)
    up, down = torch.randn(E, 2 * I, D, generator=draw), torch.randn(E, D, I, generator=draw)
    with torch.inference_mode():
        weights, ids = ops.moe_route(logits, None, top_k=3, routed_scaling_factor=2.5)
        out = ops.moe_experts(x, weights, ids, up, down)
    for t in range(T):
        scores = torch.sigmoid(logits[t].double())
        best = scores.argsort(descending=True)[:3]
        expected = torch.zeros(D, dtype=torch.float64)
        for e in best.tolist():
            gate, other = (up[e].double() @ x[t].double()).split(I)
            share = 2.5 * scores[e] / scores[best].sum()
            expected += share * (down[e].double() @ (gate * torch.sigmoid(gate) * other))
        torch.testing.assert_close(out[t].double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.op)
def test_calls_repeat_to_the_bit(kernel: Kernel) -> None:
    for sample in smoke(kernel.op):
        args = arguments(kernel.op, sample)
        assert same_bits(run(kernel, args), run(kernel, args)), sample.id
