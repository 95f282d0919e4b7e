"""rms_norm against Python's own arithmetic, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._rms_norm import SPEC, rms_norm, rounded_twice
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_is_the_quotient_that_it_says(sample: Sample) -> None:
    args = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args
    truth = oracle.truth(SPEC, args).outs["y"]
    D = sample.axes["D"]
    for row, y in zip(args["x"].view(-1, D).tolist(), truth.view(-1, D).tolist(), strict=True):
        rms = math.sqrt(math.fsum(v * v for v in row) / len(row) + args["eps"])
        for got, value, weight in zip(y, row, args["weight"].tolist(), strict=True):
            assert got == pytest.approx(value / rms * weight, rel=1e-13, abs=1e-300)


def test_eps_is_added_to_the_mean_square() -> None:
    x = torch.tensor([[1e-3, 0.0]])
    y = rms_norm(x.double(), torch.ones(2).double(), eps=1e-6)
    assert y[0, 0].item() == pytest.approx(x[0, 0].double().item() / math.sqrt(5e-7 + 1e-6), rel=1e-7)


def test_any_leading_dims() -> None:
    x = torch.randn(2, 3, 8)
    assert torch.equal(rms_norm(x, torch.ones(8), eps=1e-5)[1, 2], rms_norm(x[1, 2], torch.ones(8), eps=1e-5))


def test_a_float32_weight_is_not_rounded_to_the_activations_dtype() -> None:
    x, weight = torch.ones(1, 4, dtype=torch.bfloat16), torch.full((4,), 1.00390625 + 2**-10)
    y = rms_norm(x, weight, eps=0.0)
    assert y.dtype == torch.bfloat16
    assert y[0, 0].item() == 1.0078125  # weight rounded to bfloat16 first would give 1.0


def test_it_agrees_with_torchs_own_norm() -> None:
    x, weight = torch.randn(5, 64), torch.rand(64)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-5), torch.nn.functional.rms_norm(x, (64,), weight, 1e-5))


def test_the_loosest_honest_form_is_within_one_unit_of_the_tight_one() -> None:
    x, weight = torch.randn(64, 256).bfloat16(), torch.rand(256).bfloat16()
    tight, loose = (f(x, weight, eps=1e-5).double() for f in (rms_norm, rounded_twice))
    assert not torch.equal(tight, loose)
    assert ((tight - loose).abs() <= 2**-6 * tight.abs()).all()
