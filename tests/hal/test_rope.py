"""Rope tables: the angles of float64."""

from __future__ import annotations

import math

import pytest
import torch
from toys import raised

from glm5_hal import rope_tables

THETA = 1e6


def by_hand(position: int, rotary: int, theta: float) -> list[tuple[float, float]]:
    angles = [position / theta ** (2 * i / rotary) for i in range(rotary // 2)]
    return [(math.cos(a), math.sin(a)) for a in angles]


@pytest.mark.parametrize("position", [0, 1, 4095, 200_000, 1_000_003])
def test_the_angles_are_those_of_float64(position: int) -> None:
    cos, sin = rope_tables(torch.tensor([position]), 64, THETA)
    assert cos.shape == sin.shape == (1, 32)
    assert cos.dtype == sin.dtype == torch.float32
    for i, (c, s) in enumerate(by_hand(position, 64, THETA)):
        assert abs(float(cos[0, i]) - c) < 1e-7
        assert abs(float(sin[0, i]) - s) < 1e-7


def test_angles_in_fp32_would_be_visibly_wrong_far_out() -> None:
    """The trap that the function is there for: at position 200,000 fp32 angles are off by more than 1e-3."""
    position = torch.tensor([200_000 - n for n in range(64)])
    inverse = 1.0 / (THETA ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    naive = (position.float()[:, None] * inverse).cos()
    cos, _ = rope_tables(position, 64, THETA)
    assert (naive - cos).abs().max() > 1e-3


def test_positions_may_be_of_any_integer_dtype_and_none_at_all() -> None:
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(
            rope_tables(torch.tensor([5], dtype=dtype), 8, 1e4)[0], rope_tables(torch.tensor([5]), 8, 1e4)[0]
        )
    assert rope_tables(torch.empty(0, dtype=torch.int64), 8, 1e4)[0].shape == (0, 4)


@pytest.mark.parametrize(("rotary", "theta"), [(63, 1e4), (0, 1e4), (-2, 1e4), (64, 0.0), (64, -1.0)])
def test_tables_that_cannot_be(rotary: int, theta: float) -> None:
    assert raised(rope_tables, torch.tensor([1]), rotary, theta).code == "SCALAR"
