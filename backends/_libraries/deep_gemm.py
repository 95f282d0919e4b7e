"""DeepGEMM's grouped product, and libraries that have it: every expert's rows begin at a multiple of a block, and each
row says whose it is, -1 for a row of padding. So rows are spread out before and gathered after; the experts' weights,
which are most of the bytes, stay where they are.

Legend: M rows, K input features, N output features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_hal.backends._libraries.physical import aligned, requests_of


def grouped(
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor], Any],
    align: int,
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
) -> Tensor:
    """`grouped_gemm` by ``multiply(rows, weights, results, owners)``, whose blocks have ``align`` rows."""
    (M, K), (E, N, _) = x.shape, weight.shape
    if M == 0 or E == 0:
        return x.new_zeros(M, N)
    room = -(-(M + E * (align - 1)) // align) * align
    expert, place = _spread(expert_offsets, M, E, align, room)
    spread = x.new_empty(room + 1, K)  # the last row is for rows that are not in use
    spread.index_copy_(0, place, x)
    owner = torch.full((room + 1,), -1, dtype=torch.int32, device=x.device)
    owner.index_copy_(0, place, expert.int())
    y = x.new_empty(room, N)
    multiply(spread[:room], aligned(weight), y, owner[:room])
    return y.index_select(0, place.clamp_max(room - 1)).masked_fill_((expert == E)[:, None], 0.0)


def _spread(expert_offsets: Tensor, M: int, E: int, align: int, room: int) -> tuple[Tensor, Tensor]:
    """The expert of each row, E where it is not in use, and where the row goes, [M] int64 each."""
    expert = requests_of(expert_offsets, M)
    blocks = (expert_offsets.diff() + (align - 1)) // align
    starts = (blocks.cumsum(0) - blocks) * align
    shift = torch.cat([starts - expert_offsets[:-1], starts.new_zeros(1)])  # of every expert's rows, and of the others
    place = torch.arange(M, device=expert.device) + shift.index_select(0, expert)
    return expert, torch.where(expert < E, place, room)
