"""Attention of single tokens over rows of a latent cache, in the absorbed form: what dense and sparse have in common.

A program takes some heads of one token over one part of its keys; a tile of latents is keys and values at once.

Legend: T tokens, H heads, m heads of a program, n keys of a tile, L latent width, R rope width, K indices per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton import rows
from glm5_hal.backends._triton.declare import addresses, launch
from glm5_hal.backends._triton.ragged import keys_seen, owner
from glm5_hal.backends._triton.rows import latent_rows, rope_rows
from glm5_hal.backends._triton.softmax import Splits, merge, natural_log, seen, share
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.formats import FORMATS
from glm5_hal.ops._common import caches as bytes_of

#: A kernel with the parameters of `_attend`: for such a cache, what it takes for it and its fixed block sizes.
Forward = Callable[[rows.Fields], tuple[object, rows.Fields, Mapping[str, int]]]


def attend(
    tuning: Tuning,
    op: str,
    q: Tensor,
    kv_cache: Tensor,
    rope_cache: Tensor | None,
    indices: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    scale: float,
    L: int,
    cache_format: str,
    *,
    invariant: bool,
    forward: Forward | None = None,
) -> tuple[Tensor, Tensor]:
    """``out [T, H, L]`` and ``lse [T, H]`` over the keys that ``indices`` name, or over all that each token sees."""
    (T, H, W), (B, M), page = q.shape, block_table.shape, kv_cache.shape[1]
    out, lse = q.new_empty(T, H, L), q.new_empty(T, H, dtype=torch.float32)
    held = rows.fields(FORMATS[cache_format], bytes_of.held(kv_cache, rope_cache), L)
    chosen = block_table if indices is None else indices  # a pointer that is not read
    kernel, held, fixed = forward(held) if forward else (_attend, held, {})
    kind = held.compute(q.dtype)
    width = kind.primitive_bitwidth // 8
    sizes = tuning.products(op, width)
    sizes["BLOCK_H"] = min(sizes["BLOCK_H"], max(triton.next_power_of_2(H), 16))
    quantised = sizes.pop("BLOCK_N_QUANTISED")
    sizes["BLOCK_N"] = quantised if held.group else max(sizes["BLOCK_N"] * 2 // width, 16)
    if held.group and kind == tl.float32:  # more of them at once would not fit the registers
        sizes["num_stages"] = 1
    sizes |= fixed
    blocks = triton.cdiv(H, sizes["BLOCK_H"])
    keys = M * page if indices is None else indices.shape[1]
    splits = Splits.of(sizes, T * blocks, keys, invariant)
    merging = {name: sizes.pop(name) for name in ("MERGE_S", "MERGE_L")}
    shared = {
        "L": L, "CHOSEN": indices is not None, "LEAST": splits.least, "BLOCK_B": triton.next_power_of_2(max(B, 1)),
        "BLOCK_N": sizes.pop("BLOCK_N"), "INDEX": addresses(tuning),
    }  # fmt: skip
    lengths, offsets = seq_lens.contiguous(), cu_seqlens_q.contiguous()
    for first, tokens, sums, bounds in splits.launches(out):
        grid = (tokens * blocks, splits.grid)
        launch(
            kernel, grid, q, q, *q.stride(), chosen, *chosen.stride(), block_table, *block_table.stride(),
            lengths, offsets, *held.args, out, lse, sums, bounds,
            B, keys, first, tokens * H, splits.grid, splits.most, H, scale * math.log2(math.e),
            PAGE=page, R=W - L, BLOCK_L=triton.next_power_of_2(max(L, 16)),
            BLOCK_R=triton.next_power_of_2(max(W - L, 16)), GROUP=held.group, TYPE=kind, FP8=tuning.fp8,
            **shared, **sizes,
        )  # fmt: skip
        if splits.grid > 1:
            launch(
                merge, (tokens * H, triton.cdiv(L, merging["MERGE_L"])), q, sums, bounds, out, lse, lengths, offsets,
                B, keys, first, tokens * H, splits.grid, splits.most, H, **shared, **merging,
            )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["B", "K", "first", "rows", "room", "most", "H"])
def _attend(
    q, q_token, q_head, q_col, chosen, chosen_token, chosen_col, table, table_row, table_col, seq_lens, offsets,
    latent, latent_page, latent_row, rope, rope_page, rope_row, scales, scale_page, scale_row,
    out, lse, sums, bounds, B, K, first, rows, room, most, H, scale,
    PAGE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, CHOSEN: tl.constexpr, LEAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, TYPE: tl.constexpr, FP8: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    blocks = (H + BLOCK_H - 1) // BLOCK_H
    local, split = tl.program_id(0) // blocks, tl.program_id(1)
    token = first + local
    head = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    request = owner(token, offsets, B, BLOCK_B)
    keys = K
    if not CHOSEN:
        keys = keys_seen(token, request, offsets, seq_lens)
    size = share(keys, most, LEAST, BLOCK_N)
    start = split * size
    if (split > 0) & (start >= keys):
        return
    stop = tl.minimum(start + size, keys)
    chosen += token.to(INDEX) * chosen_token
    if CHOSEN:
        stop = _last(chosen, chosen_col, start, stop, LEAST)
    table += request.to(INDEX) * table_row

    col_L, col_R = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    some_H = head < H
    q += token.to(INDEX) * q_token
    at_H = (head.to(INDEX) * q_head)[:, None]
    here_L, here_R = some_H[:, None] & (col_L < L)[None, :], some_H[:, None] & (col_R < R)[None, :]
    q_latent = tl.load(q + at_H + (col_L * q_col)[None, :], mask=here_L, other=0.0).to(TYPE)
    q_rope = tl.load(q + at_H + ((L + col_R) * q_col)[None, :], mask=here_R, other=0.0).to(TYPE)

    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    sums_L = tl.zeros((BLOCK_H, BLOCK_L), tl.float32)
    whole = start
    if not CHOSEN:  # tiles that are full need no mask
        whole = tl.maximum(start, stop // BLOCK_N * BLOCK_N)
        peak, total, sums_L = _over(
            peak, total, sums_L, q_latent, q_rope, start, whole, chosen, chosen_col, table, table_col,
            latent, latent_page, latent_row, rope, rope_page, rope_row, scales, scale_page, scale_row, scale,
            PAGE, L, R, False, False, BLOCK_N, BLOCK_L, BLOCK_R, GROUP, TYPE, FP8, INDEX,
        )  # fmt: skip
    peak, total, sums_L = _over(
        peak, total, sums_L, q_latent, q_rope, whole, stop, chosen, chosen_col, table, table_col,
        latent, latent_page, latent_row, rope, rope_page, rope_row, scales, scale_page, scale_row, scale,
        PAGE, L, R, CHOSEN, True, BLOCK_N, BLOCK_L, BLOCK_R, GROUP, TYPE, FP8, INDEX,
    )  # fmt: skip

    if size >= keys:  # the only part
        to = token.to(INDEX) * H + head
        mean = tl.where(stop > start, sums_L / total[:, None], 0.0)
        tl.store(out + (to * L)[:, None] + col_L[None, :], mean.to(out.dtype.element_ty), mask=here_L)
        tl.store(lse + to, natural_log(peak, total), mask=some_H)
    else:
        part = (local * H + head) * room + split
        tl.store(sums + (part * L)[:, None] + col_L[None, :], sums_L, mask=here_L)
        tl.store(bounds + part, peak, mask=some_H)
        tl.store(bounds + rows * room + part, tl.where(stop > start, total, -1.0), mask=some_H)


@triton.jit
def _over(
    peak, total, sums_L, q_latent, q_rope, start, stop, chosen, chosen_col, table, table_col,
    latent, latent_page, latent_row, rope, rope_page, rope_row, scales, scale_page, scale_row, scale,
    PAGE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, CHOSEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr,
    FP8: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The state after keys (or the keys that indices name) start to stop, in tiles that begin at multiples of their
    size. Where pages are made of whole tiles, a tile has one page."""
    n = tl.arange(0, BLOCK_N)
    for key in range(start, stop, BLOCK_N):
        i = key + n
        some = tl.full((BLOCK_N,), True, tl.int1)
        if MASKED:
            some = i < stop
        if CHOSEN or PAGE % BLOCK_N:
            place = i
            if CHOSEN:
                place = tl.load(chosen + i * chosen_col, mask=some, other=-1)
                some = place >= 0
            page = tl.load(table + place // PAGE * table_col, mask=some, other=0).to(INDEX)
            slot = place % PAGE
            row, row_scale = page * latent_page + slot * latent_row, page * scale_page + slot * scale_row
            row_rope = page * rope_page + slot * rope_row
            in_latent, in_scales, in_rope = latent, scales, rope
        else:
            page = tl.load(table + key // PAGE * table_col).to(INDEX)
            slot = key % PAGE + n
            row, row_scale, row_rope = slot * latent_row, slot * scale_row, slot * rope_row
            in_latent, in_scales = latent + page * latent_page, scales + page * scale_page
            in_rope = rope + page * rope_page
        values = latent_rows(in_latent, row, in_scales, row_scale, some, L, BLOCK_L, GROUP, TYPE, FP8)
        scores = tl.dot(q_latent, tl.trans(values), input_precision="ieee")
        ropes = rope_rows(in_rope, row_rope, some, R, BLOCK_R, GROUP, TYPE)
        scores = tl.dot(q_rope, tl.trans(ropes), scores, input_precision="ieee")
        peak, total, sums_L = seen(peak, total, sums_L, scores, scale, some, values, MASKED)
    return peak, total, sums_L


@triton.jit
def _last(chosen, chosen_col, start, stop, STEP: tl.constexpr):
    """Where the indices start..stop of a token end, without the -1 behind them all; ``start`` where all are -1."""
    last = start
    for key in range(start, stop, STEP):
        i = key + tl.arange(0, STEP)
        index = tl.load(chosen + i * chosen_col, mask=i < stop, other=-1)
        last = tl.maximum(last, tl.max(tl.where(index >= 0, i + 1, 0), 0))
    return last
