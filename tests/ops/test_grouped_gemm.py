"""grouped_gemm against one inner product at a time."""

from __future__ import annotations

import math

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops._grouped_gemm import PERIOD, SPEC, expert_weights, grouped_gemm
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_every_row_meets_its_own_experts_weight(sample: Sample) -> None:
    args = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args
    truth = oracle.truth(SPEC, args).outs["y"]
    x, weight, ends = args["x"].double(), args["weight"].double(), args["expert_offsets"].tolist()
    for m in range(x.shape[0]):
        owner = next((e for e in range(len(ends) - 1) if ends[e] <= m < ends[e + 1]), None)
        for n in range(weight.shape[1]):
            if owner is None:
                assert truth[m, n].item() == 0.0
                continue
            products = (x[m] * weight[owner, n]).tolist()
            assert truth[m, n].item() == pytest.approx(math.fsum(products), rel=1e-11, abs=1e-11)


def test_the_weight_is_out_by_in() -> None:
    weight = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    y = grouped_gemm(torch.tensor([[1.0, 10.0]]), weight, torch.tensor([0, 1]).int())
    assert y.tolist() == [[21.0, 43.0, 65.0]]


def test_rows_in_no_group_are_zero_and_not_read() -> None:
    x = torch.tensor([[1.0], [math.nan]])
    assert grouped_gemm(x, torch.ones(1, 1, 1), torch.tensor([0, 1]).int()).tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("offsets", [[1, 2], [0, 3], [0, -1]])
def test_offsets_out_of_order_are_refused(offsets: list[int]) -> None:
    assert SPEC.check_values is not None
    with pytest.raises(HalError) as refused:
        SPEC.check_values(
            {
                "x": torch.ones(2, 1),
                "weight": torch.ones(1, 1, 1),
                "expert_offsets": torch.tensor(offsets).int(),
                "weight_format": "plain",
            }
        )
    assert refused.value.code == "VALUE"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_kept_in_float32_and_rounded_once(dtype: str) -> None:
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    x = torch.full((1, 257), unit).to(getattr(torch, dtype))
    x[0, 0] = 1.0  # each further term is lost beside 1 in the storage dtype; together they are 256 units
    y = grouped_gemm(x, torch.ones(1, 1, 257, dtype=x.dtype), torch.tensor([0, 1]).int())
    assert y.item() == 1 + 256 * unit


def test_no_two_rows_of_sample_weights_are_alike() -> None:
    """They are tiled from one draw: rows must still differ, or a wrong row or expert would not show."""
    weight = expert_weights(Draw(0, "x"), 3, 512, 1024, dtype="bfloat16").flatten(0, 1)
    assert weight.numel() > PERIOD
    assert len(weight.unique(dim=0)) == len(weight)
    assert all(s.axes["N"] * len(s.axes["rows"]) < PERIOD for s in SPEC.samples())
