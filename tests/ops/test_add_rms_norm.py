"""add_rms_norm against Python's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glm5_hal.conformance import oracle
from glm5_hal.conformance.calibrated import calibrated
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.rounding import unit_roundoff
from glm5_hal.ops._add_rms_norm import SPEC, add_rms_norm
from glm5_hal.ops._rms_norm import rms_norm
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_is_the_norm_of_the_sum(sample: Sample) -> None:
    args = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args
    truth, D = oracle.truth(SPEC, args).outs, args["weight"].shape[0]
    rows = [args[n].double().reshape(-1, D).tolist() for n in ("x", "residual")]
    outs = [truth[n].reshape(-1, D).tolist() for n in ("y", "residual_out")]
    for x, residual, y, out in zip(*rows, *outs, strict=True):
        h = [a + b for a, b in zip(x, residual, strict=True)]
        rms = math.sqrt(math.fsum(v * v for v in h) / D + args["eps"])
        assert out == pytest.approx(h, rel=1e-14)
        expected = [v / rms * w for v, w in zip(h, args["weight"].tolist(), strict=True)]
        assert y == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_the_stored_sum_is_rounded_once_and_no_input_is_written() -> None:
    x, residual = torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    before = x.clone(), residual.clone()
    _, out = add_rms_norm(x, residual, torch.ones(8).bfloat16(), eps=1e-5)
    assert torch.equal(out, (x.float() + residual.float()).bfloat16())
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_is_the_unfused_pair_bit_for_bit(dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, 64).to(dtype), 3 * torch.randn(5, 64).to(dtype), torch.rand(64).to(dtype)
    y, out = add_rms_norm(x, residual, weight, eps=1e-5)
    assert torch.equal(out, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, eps=1e-5))


def norm_of_the_unrounded_sum(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float() + residual.float()
    return (h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * weight.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_norm_of_the_stored_sum_and_one_of_the_fp32_sum_both_pass(dtype: str) -> None:
    """Fused kernels in use do either: neither may be failed, and they are not the same."""
    args = SPEC.inputs(Sample("x", {"T": 40, "D": 512}), dtype, Draw(0, "x")).args
    truth, honest = oracle.truth(SPEC, args).outs["y"], oracle.emulation(SPEC, args).outs["y"]
    both = add_rms_norm(**args)[0], norm_of_the_unrounded_sum(**args)
    assert not torch.equal(*both)
    for y in both:
        assert calibrated(y, truth, honest, unit=unit_roundoff(dtype), floor=2e-6).ok


def test_eps_counts_where_the_sum_cancels() -> None:
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    residual = -x + torch.tensor([[1e-3, 0.0]], dtype=torch.float64)
    y, _ = add_rms_norm(x, residual, torch.ones(2, dtype=torch.float64), eps=1e-6)
    assert y[0].tolist() == pytest.approx([1e-3 / math.sqrt(5e-7 + 1e-6), 0.0])
