"""add_rms_norm against Python's own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._add_rms_norm import SPEC, add_rms_norm
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
