"""moe_permute against lists, and its round trip with moe_combine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops._moe_combine import moe_combine
from glm5_hal.ops._moe_permute import SPEC, chosen_experts, moe_permute
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


def args_of(sample: Sample) -> dict[str, Any]:
    return dict(SPEC.inputs(sample, "float32", Draw(0, sample.id)).args)


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_rows_lie_by_expert_then_token_then_slot(sample: Sample) -> None:
    args = args_of(sample)
    permuted, offsets, inverse = moe_permute(**args)
    x, ids = args["x"].tolist(), args["topk_ids"].tolist()
    E = args["num_experts"]
    order = [(e, t, k) for e in range(E) for t, row in enumerate(ids) for k, i in enumerate(row) if i == e]
    width = args["x"].shape[1]
    assert permuted.tolist() == [x[t] for _, t, _ in order] + [[0.0] * width] * (permuted.shape[0] - len(order))
    assert offsets.tolist() == [sum(e < bound for e, _, _ in order) for bound in range(E + 1)]
    places = {(t, k): n for n, (_, t, k) in enumerate(order)}
    assert inverse.tolist() == [[places.get((t, k), -1) for k in range(len(row))] for t, row in enumerate(ids)]
    assert (offsets.dtype, inverse.dtype) == (torch.int32, torch.int32)


def test_no_row_for_an_expert_elsewhere() -> None:
    permuted, offsets, inverse = moe_permute(
        torch.tensor([[1.0], [2.0]]), torch.tensor([[-1, 1], [-1, -1]], dtype=torch.int32), num_experts=2
    )
    assert permuted.tolist() == [[1.0], [0.0], [0.0], [0.0]]
    assert offsets.tolist() == [0, 0, 1]
    assert inverse.tolist() == [[-1, 0], [-1, -1]]


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_with_experts_that_do_nothing_combining_gives_the_weighted_token(sample: Sample) -> None:
    args = args_of(sample)
    permuted, _, inverse = moe_permute(**args)
    weights = torch.rand(inverse.shape)
    expected = args["x"].double() * (weights.double() * (args["topk_ids"] >= 0)).sum(1, keepdim=True)
    torch.testing.assert_close(moe_combine(permuted, weights, inverse).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [-2, 3])
def test_ids_out_of_range_are_refused(wrong: int) -> None:
    assert SPEC.check_values is not None
    with pytest.raises(HalError) as refused:
        SPEC.check_values({"x": torch.ones(1, 1), "topk_ids": torch.tensor([[wrong]]), "num_experts": 3})
    assert (refused.value.code, refused.value.value) == ("VALUE", wrong)


def test_the_same_expert_twice_gives_two_rows() -> None:
    _, offsets, inverse = moe_permute(torch.ones(1, 2), torch.tensor([[1, 1]], dtype=torch.int32), num_experts=2)
    assert offsets.tolist() == [0, 0, 2]
    assert inverse.tolist() == [[0, 1]]


def test_sampled_experts_are_distinct_and_some_are_elsewhere() -> None:
    ids = chosen_experts(Draw(0, "x"), 50, 4, 9, elsewhere=4)
    for row in ids.tolist():
        here = [i for i in row if i >= 0]
        assert len(set(here)) == len(here)
    assert (ids[0] < 0).all()
    assert (ids[-1] >= 0).all()
    assert 0.3 < (ids < 0).double().mean() < 0.7
