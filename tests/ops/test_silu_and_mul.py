"""silu_and_mul against Python's own exponential."""

from __future__ import annotations

import math

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._silu_and_mul import SPEC, rounded_twice, silu_and_mul
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


def by_hand(gate: float, up: float, limit: float | None) -> float:
    if math.isnan(gate) or math.isnan(up):
        return math.nan
    if limit is not None:
        gate, up = min(gate, limit), max(-limit, min(up, limit))
    if gate == -math.inf:  # (−∞) · 0, as in torch's own silu
        return math.nan
    return gate / (1 + math.exp(-gate)) * up if gate > -700 else 0.0


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_is_the_product_that_it_says(sample: Sample) -> None:
    args = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args
    truth = oracle.truth(SPEC, args).outs["y"]
    half = truth.shape[-1]
    x = args["x"].double().reshape(-1, 2 * half).tolist()
    for row, got in zip(x, truth.reshape(-1, half).tolist(), strict=True):
        for i, value in enumerate(got):
            expected = by_hand(row[i], row[half + i], args["limit"])
            assert value == pytest.approx(expected, rel=1e-12, abs=1e-14, nan_ok=True)


def test_the_first_half_is_the_gate() -> None:
    assert silu_and_mul(torch.tensor([[0.0, 5.0]])).item() == 0.0
    assert silu_and_mul(torch.tensor([[30.0, 5.0]])).item() == pytest.approx(150.0)


def test_the_gate_is_cut_above_only_and_the_other_half_on_both_sides() -> None:
    y = silu_and_mul(torch.tensor([[20.0, -20.0, -20.0, 20.0]]).double(), limit=10.0)
    expected = [by_hand(10, -10, None), by_hand(-20, 10, None)]
    assert y[0].tolist() == pytest.approx(expected)


def test_large_negative_gates_give_zero_and_not_nan() -> None:
    assert silu_and_mul(torch.tensor([[-1e4, 3.0]])).item() == 0.0


@pytest.mark.parametrize("limit", [None, 10.0])
def test_nan_in_either_half_stays_nan_through_the_clamp(limit: float | None) -> None:
    x = torch.tensor([[math.nan, 1.0, 2.0, math.nan]])
    assert silu_and_mul(x, limit=limit).isnan().all()


def test_infinities_are_cut_to_the_limit() -> None:
    x = torch.tensor([[math.inf, 1.0, 2.0, -math.inf]], dtype=torch.float64)
    y = silu_and_mul(x, limit=10.0)
    assert y[0].tolist() == pytest.approx([by_hand(10, 2, None), by_hand(1, -10, None)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loosest_honest_form_rounds_silu_too(dtype: torch.dtype) -> None:
    x = torch.randn(64, 256).to(dtype)
    tight, loose = (f(x).double() for f in (silu_and_mul, rounded_twice))
    assert not torch.equal(tight, loose)
    assert ((tight - loose).abs() <= 4 * torch.finfo(dtype).eps * tight.abs() + 2.0**-24).all()
