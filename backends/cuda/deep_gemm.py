"""DeepGEMM's grouped product for Hopper and Blackwell as a kernel of ours.

Its convention, of its interface and its tests at 54e2261: every expert's rows begin at a multiple of the block that
`get_m_alignment_for_contiguous_layout` names, and each row says whose it is, -1 for a row of padding. So rows are
spread out before and gathered after; the experts' weights, which are most of the bytes, stay where they are.

Left out are its scores for the lightning indexer (`fp8_mqa_logits`, `fp8_paged_mqa_logits`): they take queries in
float8, and `indexer_logits` rounds nothing.

Legend: M rows, K input features, N output features, E experts.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends.cuda.physical import aligned, requests_of
from glm5_hal.capability import arch, contiguous, dtype, multiple_of


@kernel(
    "grouped_gemm",
    "deep_gemm",
    requires=(
        arch("sm_90", "sm_100", "sm_103"),
        dtype("x", "bfloat16"),
        multiple_of("K", 64),
        multiple_of("N", 64),
        contiguous("weight"),
    ),
    provides=("deterministic", "graph_safe"),
)
def grouped_gemm(x: Tensor, weight: Tensor, expert_offsets: Tensor, *, weight_format: str = "plain") -> Tensor:
    (M, K), (E, N, _) = x.shape, weight.shape
    if M == 0 or E == 0:
        return x.new_zeros(M, N)
    library = import_module("deep_gemm")
    align: int = library.get_m_alignment_for_contiguous_layout()
    room = -(-(M + E * (align - 1)) // align) * align
    expert, place = _spread(expert_offsets, M, E, align, room)
    spread = x.new_empty(room + 1, K)  # the last row is for rows that are not in use
    spread.index_copy_(0, place, x)
    owner = torch.full((room + 1,), -1, dtype=torch.int32, device=x.device)
    owner.index_copy_(0, place, expert.int())
    y = x.new_empty(room, N)
    library.m_grouped_bf16_gemm_nt_contiguous(spread[:room], aligned(weight), y, owner[:room])
    return y.index_select(0, place.clamp_max(room - 1)).masked_fill_((expert == E)[:, None], 0.0)


def _spread(expert_offsets: Tensor, M: int, E: int, align: int, room: int) -> tuple[Tensor, Tensor]:
    """The expert of each row, E where it is not in use, and where the row goes, [M] int64 each."""
    expert = requests_of(expert_offsets, M)
    blocks = (expert_offsets.diff() + (align - 1)) // align
    starts = (blocks.cumsum(0) - blocks) * align
    shift = torch.cat([starts - expert_offsets[:-1], starts.new_zeros(1)])  # of every expert's rows, and of the others
    place = torch.arange(M, device=expert.device) + shift.index_select(0, expert)
    return expert, torch.where(expert < E, place, room)
