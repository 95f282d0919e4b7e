"""Rows are read where they lie, and blocks are filled with as many of them as there is room for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from glm5_hal.backends._triton.strided import rows, tile


def starts(x: Tensor) -> list[int]:
    """Where each row begins, as `row_start` computes it."""
    _, inner, outer_step, inner_step = rows(x)
    count = x[..., 0].numel()
    return [row // inner * outer_step + row % inner * inner_step for row in range(count)]


def truth(x: Tensor) -> list[int]:
    at = torch.arange(x.untyped_storage().nbytes() // x.element_size())
    return at.as_strided(x.shape, x.stride())[..., 0].flatten().tolist()


BASE = torch.zeros(4, 6, 10, 16)


@pytest.mark.parametrize(
    "x",
    [
        BASE,
        BASE[0, 0, 0],
        BASE[..., 3:9],
        BASE[:, :2, :1, :8],
        BASE[:, :, ::2],
        BASE[:, ::3, :4].flatten(1, 2),
        BASE[0].transpose(0, 1),
        BASE[0].transpose(1, 2),
        BASE[1:2, :1].transpose(0, 2),
        BASE[0, 0, 0].expand(3, 16),
        BASE[0, 0].T,
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.stride()}",
)
def test_no_copy_where_two_steps_reach_every_row(x: Tensor) -> None:
    assert rows(x)[0] is x
    assert starts(x) == truth(x)


def test_a_tensor_whose_dims_are_all_apart_is_copied() -> None:
    x = BASE[::2, ::2, ::2]
    given = rows(x)[0]
    assert given.is_contiguous()
    assert torch.equal(given, x)
    assert starts(x) == truth(given)


def test_rows_in_one_piece_share_a_block_or_have_it_alone() -> None:
    sizes = {"BLOCK": 2048, "num_warps": 4}
    assert tile(sizes, 512) == {"ROWS": 4, "COLS": 512, "num_warps": 4}
    assert tile(sizes, 6144) == {"ROWS": 1, "COLS": 8192, "num_warps": 4}


def test_rows_that_may_be_in_pieces_are_no_longer_than_that() -> None:
    assert tile({"BLOCK": 2048}, 6144, 2048) == {"ROWS": 1, "COLS": 2048}
    assert tile({"BLOCK": 2048}, 100, 2048) == {"ROWS": 16, "COLS": 128}
