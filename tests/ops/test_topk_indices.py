"""topk_indices against Python's sort."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops._topk_indices import SPEC, topk_indices
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


def by_sorting(args: dict[str, Any]) -> list[list[int]]:
    rows = []
    for row, length in zip(args["scores"].tolist(), args["seq_lens"].tolist(), strict=True):
        eligible = [j for j in range(length) if not math.isnan(row[j]) and row[j] != -math.inf]
        best = sorted(eligible, key=lambda j: (-row[j], j))[: args["top_k"]]
        rows.append(sorted(best) + [-1] * (args["top_k"] - len(best)))
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_is_the_head_of_the_sorted_keys(sample: Sample, dtype: str) -> None:
    args = dict(SPEC.inputs(sample, dtype, Draw(0, sample.id)).args)
    got = topk_indices(**args)
    assert got.dtype == torch.int32
    assert got.tolist() == by_sorting(args)


def chosen(scores: list[float], k: int, length: int | None = None) -> list[int]:
    lens = torch.tensor([len(scores) if length is None else length], dtype=torch.int32)
    return topk_indices(torch.tensor([scores]), lens, top_k=k)[0].tolist()


def test_ties_go_to_the_lower_index() -> None:
    assert chosen([1.0, 2.0, 1.0, 1.0], 2) == [0, 1]


def test_both_zeros_are_one_value() -> None:
    assert chosen([-0.0, 0.0, -0.0], 2) == [0, 1]


def test_negative_scores_beat_padding() -> None:
    assert chosen([-3.0, -1.0, -2.0], 4) == [0, 1, 2, -1]


def test_nan_and_minus_infinity_are_never_chosen_and_plus_infinity_is() -> None:
    assert chosen([math.nan, -math.inf, 1.0, math.inf], 4) == [2, 3, -1, -1]


def test_what_lies_beyond_the_length_is_not_read() -> None:
    assert chosen([1.0, 0.0, 9.0, math.nan], 2, length=2) == [0, 1]


def test_a_row_without_keys_is_all_padding() -> None:
    assert chosen([5.0, 6.0], 3, length=0) == [-1, -1, -1]


def test_more_places_than_keys() -> None:
    assert chosen([5.0, 6.0], 4) == [0, 1, -1, -1]


@pytest.mark.parametrize("length", [-1, 5])
def test_lengths_out_of_range_are_refused(length: int) -> None:
    args = {"scores": torch.zeros(1, 4), "seq_lens": torch.tensor([length], dtype=torch.int32)}
    assert SPEC.check_values is not None
    with pytest.raises(HalError) as refused:
        SPEC.check_values(args)
    assert refused.value.code == "VALUE"
    assert refused.value.value == length
