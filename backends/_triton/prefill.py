"""Attention with full heads over ragged batches: a block of one request's queries of one head to a program.

Legend: T query tokens, S key tokens, H heads, Dqk and Dv head dims, m queries of a block, n keys of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.ragged import block_of
from glm5_hal.backends._triton.softmax import natural_log
from glm5_hal.backends._triton.tuning import Tuning

#: The rows for which block sizes are given: 256 numbers of 16 bits.
ROW_BYTES = 512

#: Bytes of a row that its second part has at least.
LEAST = 128


@triton_kernel("mla_prefill", provides=("deterministic", "batch_invariant", "graph_safe"))
def mla_prefill(
    tuning: Tuning,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    (T, H, Dqk), Dv, B = q.shape, v.shape[2], len(cu_seqlens_q) - 1
    out, lse = q.new_empty(T, H, Dv), q.new_empty(T, H, dtype=torch.float32)
    meta = _sizes(tuning.products("mla_prefill", q.element_size()), max(Dqk, Dv) * q.element_size())
    first, second = _parts(Dqk, q.element_size())
    launch(
        _mla_prefill, (triton.cdiv(T, meta["BLOCK_M"]) + B if T else 0, H), q,
        q, k, v, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), out, lse, B, H, scale * math.log2(math.e),
        *q.stride(), *k.stride(), *v.stride(),
        DQK=Dqk, DV=Dv, FIRST=first, SECOND=second, BLOCK_V=max(16, triton.next_power_of_2(Dv)),
        BLOCK_B=triton.next_power_of_2(max(B, 32)), CAUSAL=causal, INDEX=addresses(tuning), **meta,
    )  # fmt: skip
    return out, lse


def _sizes(sizes: Mapping[str, int], bytes_of_row: int) -> dict[str, int]:
    """Longer rows than those that ``sizes`` are for make smaller blocks."""
    longer = max(1, triton.next_power_of_2(bytes_of_row) // ROW_BYTES)
    return {**sizes, **{name: max(16, sizes[name] // longer) for name in ("BLOCK_M", "BLOCK_N")}}


def _parts(D: int, size: int) -> tuple[int, int]:
    """Two powers of two that hold D columns with less padding than one does, or that one and 0: 192 is 128 and 64.

    No part is narrower than LEAST bytes: scores of 64 and 32 columns of float16 came out wrong on a GPU, with Triton
    3.6, where rows were not aligned. What was compiled looks right (docs/triton.md).
    """
    whole = max(16, triton.next_power_of_2(D))
    first = whole // 2
    second = max(16, triton.next_power_of_2(D - first))
    return (first, second) if second * size >= LEAST and first + second < whole else (whole, 0)


@triton.jit(do_not_specialize=["B"])
def _mla_prefill(
    q, k, v, offsets_q, offsets_k, out, lse, B, H, scale_log2,
    q_row, q_head, q_col, k_row, k_head, k_col, v_row, v_head, v_col,
    DQK: tl.constexpr, DV: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr, CAUSAL: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The last blocks of a request see most keys: they start first, so that none is left alone at the end.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    request, first_row, stop = block_of(program, offsets_q, B, BLOCK_M, BLOCK_B)
    if request == B:
        return
    head = tl.program_id(1).to(INDEX)
    low = tl.load(offsets_k + request)
    keys = tl.load(offsets_k + request + 1) - low

    row = first_row + tl.arange(0, BLOCK_M)
    if CAUSAL:  # the last query sees all keys, the one before it one key less
        limit = tl.minimum(keys - (stop - 1 - row), keys)
        end = keys - (stop - tl.minimum(first_row + BLOCK_M, stop))
        whole = tl.maximum(keys - (stop - 1 - first_row), 0) // BLOCK_N * BLOCK_N
    else:
        limit = tl.zeros([BLOCK_M], tl.int32) + keys
        end = keys
        whole = keys // BLOCK_N * BLOCK_N
    some = (row < stop) & (limit > 0)

    q += head * q_head
    k += low.to(INDEX) * k_row + head * k_head
    v += low.to(INDEX) * v_row + head * v_head
    q1 = _rows(q, row, some, q_row, q_col, 0, DQK, FIRST, True, INDEX)
    q2 = q1
    if SECOND:
        q2 = _rows(q, row, some, q_row, q_col, FIRST, DQK, SECOND, True, INDEX)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    # Tiles that all of the queries see need no mask.
    peak, total, sums = _attend(
        peak, total, sums, q1, q2, k, v, 0, whole, limit, scale_log2, k_row, k_col, v_row, v_col,
        DQK, DV, FIRST, SECOND, BLOCK_V, BLOCK_N, False, INDEX,
    )  # fmt: skip
    peak, total, sums = _attend(
        peak, total, sums, q1, q2, k, v, whole, end, limit, scale_log2, k_row, k_col, v_row, v_col,
        DQK, DV, FIRST, SECOND, BLOCK_V, BLOCK_N, True, INDEX,
    )  # fmt: skip

    blind = limit <= 0
    sums = tl.where(blind[:, None], 0.0, sums / total[:, None])
    found = tl.where(blind, float("-inf"), natural_log(peak, total))
    place = row.to(INDEX) * H + head
    col = tl.arange(0, BLOCK_V)
    there = row < stop
    here = there[:, None] & (col < DV)[None, :]
    tl.store(out + place[:, None] * DV + col[None, :], sums.to(out.dtype.element_ty), mask=here)
    tl.store(lse + place, found, mask=there)


@triton.jit
def _attend(
    peak, total, sums, q1, q2, k, v, start, stop, limit, scale_log2, k_row, k_col, v_row, v_col,
    DQK: tl.constexpr, DV: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [start, stop): base-2 scores' peak [m], sum of weights [m], of values [m, Dv]."""
    for at in range(start, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        some = key < stop
        k1 = _rows(k, key, some, k_row, k_col, 0, DQK, FIRST, MASKED, INDEX)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if SECOND:
            k2 = _rows(k, key, some, k_row, k_col, FIRST, DQK, SECOND, MASKED, INDEX)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee")
        # A row may meet a tile in either loop, and gets the same bits: the same sums, and no fma that a compiler chose.
        highest = scores * scale_log2
        if MASKED:
            visible = key[None, :] < limit[:, None]
            highest = tl.where(visible, highest, float("-inf"))
        higher = tl.maximum(peak, tl.max(highest, 1))
        base = tl.where(tl.abs(higher) == float("inf"), 0.0, higher)  # inf - inf would be NaN
        shrink = tl.exp2(peak - base)
        weights = tl.exp2(tl.fma(scores, scale_log2, -base[:, None]))
        if MASKED:
            weights = tl.where(visible, weights, 0.0)
        total = tl.fma(total, shrink, tl.sum(weights, 1))
        values = _rows(v, key, some, v_row, v_col, 0, DV, BLOCK_V, MASKED, INDEX)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        peak = higher
    return peak, total, sums


@triton.jit
def _rows(
    x, row, some, x_row, x_col,
    FROM: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Columns FROM to FROM + BLOCK of D of these rows; 0 where there are none and, if MASKED, where not ``some``."""
    col = FROM + tl.arange(0, BLOCK)
    at = x + row.to(INDEX)[:, None] * x_row + col.to(INDEX)[None, :] * x_col
    if MASKED:
        found = tl.load(at, mask=some[:, None] & (col < D)[None, :], other=0.0)
    elif FROM + BLOCK > D:
        found = tl.load(at, mask=(col < D)[None, :], other=0.0)
    else:
        found = tl.load(at)
    return found
