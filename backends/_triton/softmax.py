"""Sums of values weighted by the softmax of scores, over keys that come tile by tile, and of keys split over programs.

Scores are in units of ln 2 here, so that exp2 serves.

Legend: T tokens, H heads, m rows (heads) of a program, n keys of a tile, L width of the values, S splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.ragged import keys_seen, owner

#: Bytes that the parts of one launch may take: the tokens of larger batches come in several launches.
ROOM = 64 * 2**20


@dataclass(frozen=True)
class Splits:
    """How the keys of each token are shared out over programs, by shapes alone.

    Attributes:
        most: a token's keys are split into so many parts at most.
        least: no part has fewer keys than this, but the last.
        grid: parts that the longest of the tokens can have.
    """

    most: int
    least: int
    grid: int

    @staticmethod
    def of(sizes: dict[str, int], programs: int, keys: int, invariant: bool) -> Splits:
        """From an op's tuning, whose keys for this are used up. ``programs`` without splits, ``keys`` at most.

        Either as many as it takes to give every processor work, or, where a token's bits must not depend on what
        comes with it, a number that follows from its own keys.
        """
        wanted, split, fixed, fixed_keys = (sizes.pop(n) for n in ("PROGRAMS", "SPLIT_KEYS", "SPLITS", "FIXED_KEYS"))
        most, least = (fixed, fixed_keys) if invariant else (max(wanted // max(programs, 1), 1), split)
        return Splits(most, least, max(min(most, triton.cdiv(keys, least)), 1))

    def launches(self, out: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first token, number of tokens, room for the parts' sums [T*H, S, L], and for their peaks and totals
        [2, T*H, S]) of each launch. Nothing is kept where a token has one part."""
        T, H, L = out.shape
        if self.grid == 1 or out.numel() == 0:
            yield 0, T, out, out
            return
        tokens = min(max(ROOM // (4 * H * self.grid * L), 1), T)
        sums = out.new_empty(tokens * H, self.grid, L, dtype=torch.float32)
        bounds = out.new_empty(2, tokens * H, self.grid, dtype=torch.float32)
        for first in range(0, T, tokens):
            yield first, min(tokens, T - first), sums, bounds


@triton.jit
def share(keys, most, LEAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many of ``keys`` each part has, in whole tiles."""
    parts = tl.maximum(tl.minimum((keys + LEAST - 1) // LEAST, most), 1)
    return tl.maximum(((keys + parts - 1) // parts + BLOCK_N - 1) // BLOCK_N, 1) * BLOCK_N


@triton.jit
def seen(peak, total, sums, scores, scale, some, values, MASKED: tl.constexpr):
    """The state ``peak [m], total [m], sums [m, L]`` after a tile: ``scores [m, n]``, still to be multiplied by
    ``scale``, of ``values [n, L]``; only ``some [n]`` count if MASKED."""
    scaled = scores * scale
    if MASKED:
        scaled = tl.where(some[None, :], scaled, float("-inf"))
    higher = tl.maximum(peak, tl.max(scaled, 1))
    base = _finite(higher)
    shrink = tl.exp2(peak - base)
    # A key may come in a full tile or in one that is not, and counts the same: no fma that a compiler chose.
    weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
    if MASKED:
        weights = tl.where(some[None, :], weights, 0.0)
    total = tl.fma(total, shrink, tl.sum(weights, 1))
    sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
    return higher, total, sums


@triton.jit
def _finite(peak):
    """What to subtract before exp2: inf - inf would be NaN."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def natural_log(peak, total):
    return (_finite(peak) + tl.log2(total)) * 0.6931471805599453


@triton.jit(do_not_specialize=["B", "K", "first", "rows", "room", "most", "H"])
def merge(
    sums, bounds, out, lse, seq_lens, offsets, B, K, first, rows, room, most, H,
    L: tl.constexpr, CHOSEN: tl.constexpr, LEAST: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    MERGE_S: tl.constexpr, MERGE_L: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Program (row, i) puts together columns i*MERGE_L.. of one row's parts, in their order.

    A total below zero says that a part has no keys.
    """
    row = tl.program_id(0)
    keys = K
    if not CHOSEN:
        token = first + row // H
        keys = keys_seen(token, owner(token, offsets, B, BLOCK_B), offsets, seq_lens)
    size = share(keys, most, LEAST, BLOCK_N)
    parts = (keys + size - 1) // size
    if parts <= 1:
        return  # the part wrote its result itself

    peaks = bounds + row * room
    totals = peaks + rows * room
    i = tl.arange(0, MERGE_S)
    peak = tl.full((MERGE_S,), float("-inf"), tl.float32)
    for s in range(0, parts, MERGE_S):
        peak = tl.maximum(peak, tl.load(peaks + s + i, mask=s + i < parts, other=float("-inf")))
    highest = tl.max(peak, 0)

    col = tl.program_id(1) * MERGE_L + tl.arange(0, MERGE_L)
    here = col < L
    total, keyed = 0.0, 0
    mean = tl.zeros((MERGE_L,), tl.float32)
    for s in range(0, parts, MERGE_S):
        one = tl.load(totals + s + i, mask=s + i < parts, other=-1.0)
        some = (one >= 0.0) | (one != one)
        weight = tl.exp2(tl.load(peaks + s + i, mask=some, other=float("-inf")) - _finite(highest))
        at = sums + ((row * room + s + i) * L)[:, None] + col[None, :]
        part = tl.load(at, mask=some[:, None] & here[None, :], other=0.0)
        mean += tl.sum(tl.where(some[:, None], part * weight[:, None], 0.0), 0)
        total += tl.sum(tl.where(some, one * weight, 0.0), 0)
        keyed += tl.sum(some.to(tl.int32), 0)

    to = first.to(INDEX) * H + row
    tl.store(out + to * L + col, tl.where(keyed > 0, mean / total, 0.0).to(out.dtype.element_ty), mask=here)
    if tl.program_id(1) == 0:
        tl.store(lse + to, natural_log(highest, total))
