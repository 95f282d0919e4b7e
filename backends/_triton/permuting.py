"""Tokens sorted by expert: a counting sort of slots, then one copy of each token to all its rows.

Legend: T tokens, K experts per token, D hidden size, E experts. A slot is one (token, k), token by token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.tuning import Tuning


@triton_kernel("moe_permute", provides=("deterministic", "graph_safe"))
def moe_permute(tuning: Tuning, x: Tensor, topk_ids: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    (T, K), D, sizes = topk_ids.shape, x.shape[1], tuning["moe_permute"]
    offsets, inverse, _ = sorted_slots(tuning, topk_ids, num_experts)
    permuted = x.new_empty(T * K, D)
    if not permuted.numel():
        return permuted, offsets, inverse
    block = min(sizes["BLOCK"], triton.next_power_of_2(D))
    launch(
        _copy, (T, triton.cdiv(D, block)), x, x, inverse, offsets, permuted, D, K, num_experts, *x.stride(),
        BLOCK=block, BLOCK_K=triton.next_power_of_2(K), INDEX=addresses(tuning), num_warps=sizes["num_warps"],
    )  # fmt: skip
    return permuted, offsets, inverse


def sorted_slots(tuning: Tuning, topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(expert_offsets, inverse_ids) as of moe_permute, and the slot of each row, undefined beyond the last."""
    (T, K), E, sizes = topk_ids.shape, experts, tuning["moe_permute"]
    total, size = T * K, sizes["SLOTS"]
    blocks = max(1, triton.cdiv(total, size))  # without any slot there are offsets all the same
    offsets, inverse, slots = (topk_ids.new_empty(shape) for shape in ((E + 1,), (T, K), (total,)))
    counts = topk_ids.new_empty(blocks, E) if blocks > 1 else slots  # one block counts for itself
    args = (total, K, E, *topk_ids.stride())
    meta = {"SLOTS": size, "BLOCK_E": min(sizes["BLOCK_E"], triton.next_power_of_2(max(E, 1)))}
    meta |= {"INDEX": addresses(tuning), "num_warps": sizes["num_warps"]}
    if blocks > 1:
        launch(_count, (blocks,), topk_ids, topk_ids, counts, *args, **meta)
    launch(
        _sort, (blocks,), topk_ids, topk_ids, counts, offsets, inverse, slots, *args, blocks,
        ALONE=blocks == 1, BLOCK_B=sizes["BLOCK_B"], **meta,
    )  # fmt: skip
    return offsets, inverse, slots


@triton.jit
def _expert_of(ids, slot, total, K, E, ids_row, ids_col, INDEX: tl.constexpr):
    """The experts of these slots; -1 for one that is not here."""
    expert = tl.load(ids + (slot // K).to(INDEX) * ids_row + (slot % K) * ids_col, mask=slot < total, other=-1)
    return tl.where(expert < E, expert, -1)


@triton.jit
def _count(ids, counts, total, K, E, ids_row, ids_col, SLOTS: tl.constexpr, BLOCK_E: tl.constexpr, INDEX: tl.constexpr):
    """How many slots of each block go to each expert, [blocks, E]."""
    block = tl.program_id(0)
    expert = _expert_of(ids, block * SLOTS + tl.arange(0, SLOTS), total, K, E, ids_row, ids_col, INDEX)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(counts + block * E + e, count, mask=e < E)


@triton.jit
def _sort(
    ids, counts, offsets, inverse, slots, total, K, E, ids_row, ids_col, blocks,
    ALONE: tl.constexpr, SLOTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A slot's row is its expert's first row, and how many slots of that expert come before it: in blocks before, and
    in its own. Each program adds up all counts: that is less than waiting for another kernel to do it."""
    block = tl.program_id(0)
    at = tl.arange(0, SLOTS)
    slot = block * SLOTS + at
    expert = _expert_of(ids, slot, total, K, E, ids_row, ids_col, INDEX)
    earlier = (expert[:, None] == expert[None, :]) & (at[None, :] < at[:, None])
    row = tl.sum(earlier.to(tl.int32), 1)
    used = 0
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        count, before = tl.zeros((BLOCK_E,), tl.int32), tl.zeros((BLOCK_E,), tl.int32)
        if ALONE:
            count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
        else:
            for start in range(0, blocks, BLOCK_B):
                b = start + tl.arange(0, BLOCK_B)
                here = (b < blocks)[:, None] & (e < E)[None, :]
                some = tl.load(counts + b[:, None] * E + e[None, :], mask=here, other=0)
                count += tl.sum(some, 0)
                before += tl.sum(tl.where((b < block)[:, None], some, 0), 0)
        begin = used + tl.cumsum(count, 0) - count
        tl.store(offsets + e, begin, mask=(e < E) & (block == 0))
        row += tl.sum(tl.where(expert[:, None] == e[None, :], (begin + before)[None, :], 0), 1)
        used += tl.sum(count, 0)
    tl.store(offsets + E, used, mask=block == 0)
    tl.store(inverse + slot, tl.where(expert >= 0, row, -1), mask=slot < total)
    tl.store(slots + row, slot, mask=expert >= 0)


@triton.jit
def _copy(
    x, inverse, offsets, permuted, D, K, E, x_row, x_col,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A token to its rows; and zeros to as many rows as it has slots, where those are beyond the last."""
    token = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    wide = col < D
    used = tl.load(offsets + E)
    here = tl.max(tl.load(inverse + token * K + k, mask=k < K, other=-1), 0) >= 0
    values = tl.load(x + token.to(INDEX) * x_row + col * x_col, mask=wide & here, other=0)
    for one in range(K):
        slot = token * K + one
        row = tl.load(inverse + slot).to(INDEX)
        tl.store(permuted + row * D + col, values, mask=wide & (row >= 0))
        tl.store(permuted + slot.to(INDEX) * D + col, tl.zeros_like(values), mask=wide & (slot >= used))
