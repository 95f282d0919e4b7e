"""rope against multiplication of complex numbers."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

import glm5_hal
from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._rope import SPEC, rope, unit_tables
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_a_pair_is_a_complex_number_times_the_tables(sample: Sample) -> None:
    args = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args
    truth = oracle.truth(SPEC, args).outs["y"]
    half = args["cos"].shape[1]
    flat_x = [token.reshape(-1, 2 * half).tolist() for token in args["x"].double()]
    flat_y = [token.reshape(-1, 2 * half).tolist() for token in truth]
    for t, heads in enumerate(flat_x):
        turns = [complex(c, s) for c, s in zip(args["cos"][t].tolist(), args["sin"][t].tolist(), strict=True)]
        for h, row in enumerate(heads):
            for i, turn in enumerate(turns):
                first, second = (2 * i, 2 * i + 1) if args["layout"] == "interleaved" else (i, i + half)
                turned = complex(row[first], row[second]) * turn
                assert flat_y[t][h][first] == pytest.approx(turned.real, rel=1e-12, abs=1e-12)
                assert flat_y[t][h][second] == pytest.approx(turned.imag, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_scores_depend_on_the_distance_only_even_far_out(layout: str) -> None:
    q, k = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)

    def score(at: int) -> float:
        angles = torch.tensor([[at], [at + 7]], dtype=torch.float64) * 1e6 ** (-torch.arange(4).double() / 4)
        cos, sin = angles.cos(), angles.sin()
        turned = [rope(x, cos[i : i + 1], sin[i : i + 1], layout=layout) for i, x in enumerate((q, k))]
        return float((turned[0] * turned[1]).sum())

    assert score(200_000) == pytest.approx(score(0), rel=1e-9)


def test_the_output_keeps_the_inputs_layout() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    quarter = torch.zeros(1, 2), torch.ones(1, 2)
    assert rope(x, *quarter, layout="interleaved").tolist() == [[-2.0, 1.0, -4.0, 3.0]]
    assert rope(x, *quarter, layout="half").tolist() == [[-3.0, -4.0, 1.0, 2.0]]


def test_the_tables_helper_computes_its_angles_in_float64() -> None:
    cos, sin = glm5_hal.rope_tables(torch.tensor([199_999]), 64, 1e6)
    for i in (0, 1, 31):
        exact = cmath.exp(1j * 199_999 * 1e6 ** (-2 * i / 64))
        assert cos[0, i].item() == pytest.approx(exact.real, abs=1e-7)
        assert sin[0, i].item() == pytest.approx(exact.imag, abs=1e-7)


def test_half_precision_is_rounded_once_from_float32() -> None:
    x, angle = torch.randn(3, 2, 8).bfloat16(), torch.rand(3, 4) * math.tau
    y = rope(x, angle.cos(), angle.sin())
    wide = rope(x.double(), angle.cos(), angle.sin())
    assert ((y.double() - wide).abs() <= 2**-8 * wide.abs() + 1e-6).all()


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_a_tokens_heads_share_its_angles_whatever_their_dims(layout: str) -> None:
    x, angle = torch.randn(4, 2, 3, 8, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    y = rope(x, angle.cos(), angle.sin(), layout=layout)
    for t in range(4):
        one = rope(x[t, 1, 2][None], angle[t : t + 1].cos(), angle[t : t + 1].sin(), layout=layout)
        assert torch.equal(y[t, 1, 2], one[0])


def test_tables_are_used_as_they_are() -> None:
    """A factor folded into the tables comes out again: they need not lie on the unit circle."""
    x, angle = torch.randn(3, 8, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        rope(x, 1.5 * angle.cos(), 1.5 * angle.sin()), 1.5 * rope(x, angle.cos(), angle.sin()), rtol=1e-14, atol=1e-14
    )


def test_turning_back_gives_the_input() -> None:
    x, angle = torch.randn(3, 2, 8, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    for layout in ("interleaved", "half"):
        turned = rope(x, angle.cos(), angle.sin(), layout=layout)
        torch.testing.assert_close(rope(turned, angle.cos(), -angle.sin(), layout=layout), x, rtol=1e-13, atol=1e-13)


def test_sample_tables_go_all_round_the_circle() -> None:
    cos, sin = unit_tables(Draw(0, "x"), 200, 8)
    assert (cos.double().square() + sin.double().square() - 1).abs().max() < 2**-22
    assert {(c > 0, s > 0) for c, s in zip(cos.flatten().tolist(), sin.flatten().tolist(), strict=True)} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
