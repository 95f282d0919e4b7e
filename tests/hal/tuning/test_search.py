"""A walk to better block sizes: one change at a time, only what is worth it, nothing that computes something else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from glm5_hal.tuning.search import alike, descend

CANDIDATES = {"BLOCK": [16, 32, 64, 128], "warps": [2, 4, 8]}


def bowl(sizes: Mapping[str, int]) -> float:
    """Best at 64 and 8."""
    return 1.0 + abs(math.log2(sizes["BLOCK"] / 64)) + abs(math.log2(sizes["warps"] / 8))


def test_it_ends_at_the_best_and_measures_nothing_twice() -> None:
    seen: list[tuple[int, int]] = []

    def measure(sizes: Mapping[str, int]) -> float:
        seen.append((sizes["BLOCK"], sizes["warps"]))
        return bowl(sizes)

    assert descend({"BLOCK": 16, "warps": 4}, CANDIDATES, measure) == ({"BLOCK": 64, "warps": 8}, 1.0)
    assert len(seen) == len(set(seen)) < 12


def test_what_saves_less_than_noise_is_not_taken() -> None:
    best, least = descend({"BLOCK": 32, "warps": 4}, CANDIDATES, lambda s: 1.0 if s["BLOCK"] == 32 else 0.99)
    assert (best, least) == ({"BLOCK": 32, "warps": 4}, 1.0)


def test_what_cannot_be_used_is_walked_around() -> None:
    def measure(sizes: Mapping[str, int]) -> float | str:
        return "out of shared memory" if sizes["BLOCK"] == 64 else bowl(sizes)

    best, _ = descend({"BLOCK": 16, "warps": 4}, CANDIDATES, measure)
    assert best == {"BLOCK": 32, "warps": 8}


def test_where_the_sizes_in_force_cannot_be_used_nothing_is_searched() -> None:
    best, least = descend({"BLOCK": 16, "warps": 4}, CANDIDATES, lambda sizes: "no device")
    assert (best, least) == ({"BLOCK": 16, "warps": 4}, math.inf)


def test_a_size_without_other_values_stays() -> None:
    assert descend({"BLOCK": 16}, {"BLOCK": [16]}, lambda sizes: 1.0) == ({"BLOCK": 16}, 1.0)


F = torch.tensor([[1.0, 2.0, torch.inf, -3.0]])
INDICES = torch.arange(200, dtype=torch.int32)[None]


@pytest.mark.parametrize(
    ("given", "expected", "same"),
    [
        (F, F, True),
        (F * 1.001, F, True),
        (F * 1.1, F, False),
        (F.nan_to_num(posinf=5.0), F, False),
        (F[:, :3], F, False),
        (F.half(), F, False),
        (INDICES.flip(1), INDICES, True),
        (torch.cat([INDICES[:, :-1], INDICES[:, -1:] + 1], 1), INDICES, True),
        (INDICES + 100, INDICES, False),
        (torch.ones(300, dtype=torch.uint8), torch.ones(300, dtype=torch.uint8), True),
        (torch.ones(300, dtype=torch.uint8), torch.zeros(300, dtype=torch.uint8), False),
        (F[:0], F[:0], True),
    ],
    ids=[
        "itself", "rounding", "wrong", "a lost infinity", "another shape", "another dtype", "another order",
        "a near tie", "other indices", "bytes", "other bytes", "nothing",
    ],
)  # fmt: skip
def test_results_that_differ_by_more_than_rounding_are_not_the_same(
    given: torch.Tensor, expected: torch.Tensor, same: bool
) -> None:
    assert alike([given], [expected]) == same


def test_results_are_as_many() -> None:
    assert not alike([F], [F, F])
