"""hadamard against its definition by bit counting."""

from __future__ import annotations

import math

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.metadata import check_constraints
from glm5_hal.ops._hadamard import SPEC, hadamard
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_entry_i_j_is_minus_one_to_the_number_of_shared_bits(sample: Sample) -> None:
    args = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args
    truth = oracle.truth(SPEC, args).outs["y"]
    x = args["x"].double().reshape(-1, args["x"].shape[-1]).tolist()
    for row, got in zip(x, truth.reshape(-1, truth.shape[-1]).tolist(), strict=True):
        for i, value in enumerate(got):
            signed = [-v if (i & j).bit_count() % 2 else v for j, v in enumerate(row)]
            assert value == pytest.approx(math.fsum(signed) * args["scale"], rel=1e-11, abs=1e-11)


def test_with_scale_one_over_root_d_it_is_its_own_inverse_and_keeps_inner_products() -> None:
    x, y = torch.randn(2, 128, dtype=torch.float64)
    turned = [hadamard(v[None], scale=128**-0.5)[0] for v in (x, y)]
    torch.testing.assert_close(turned[0] @ turned[1], x @ y)
    torch.testing.assert_close(hadamard(turned[0][None], scale=128**-0.5)[0], x)


def test_sylvesters_order() -> None:
    rows = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert hadamard(torch.eye(4), scale=1.0).tolist() == rows
    assert hadamard(torch.eye(4), scale=0.5).tolist() == [[0.5 * v for v in row] for row in rows]


def test_one_number_is_only_scaled() -> None:
    assert hadamard(torch.tensor([[3.0]]), scale=0.5).tolist() == [[1.5]]


def test_small_integers_lose_nothing_even_in_half_precision() -> None:
    x = torch.arange(128).remainder(9).sub(4).half()
    assert torch.equal(hadamard(x[None], scale=0.125).double(), hadamard(x[None].double(), scale=0.125))


@pytest.mark.parametrize("wrong", [0, 3, 48])
def test_other_widths_are_refused(wrong: int) -> None:
    with pytest.raises(HalError) as refused:
        check_constraints(SPEC, {"D": wrong}, {"scale": 1.0}, {"x": "float32"})
    assert refused.value.code == "SHAPE"
