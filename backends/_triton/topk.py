"""Exact top-k with a total order: score descending, then index ascending.

A score becomes an int32 key that sorts as scores do, and lies below them all where the score is not eligible. The key
of the k-th place is found bit by bit, by counting the keys of a block that reach it; or 8 bits at a time, from
histograms, where a row is read in several blocks. Then the row is written down in order: what lies above that key, and
of its equals the first ones, as many as there is room for.

Rows that do not fit a block, and long rows of which there are few, are cut into spans, a program each: every span gives
its own best, in order, and the best are chosen again from these.

Legend: T rows, n columns of a row, k how many to choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.tuning import Tuning

CLAIMS = ("deterministic", "batch_invariant", "canonical_ties", "sorted_indices", "graph_safe")

#: Leading bits of a score's key that tell it from others of its dtype: sign, exponent and mantissa once it is fp32.
BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 24}

#: Columns of a block at least, as many as a program may have threads: of fewer columns threads hold copies, which
#: histograms of Triton before 3.5 may count.
LEAST = 1024

#: Where blocks of a span begin: at multiples of this.
ALIGNED = tl.constexpr(LEAST)

#: What is not eligible, as a constant of kernels.
NONE = tl.constexpr(-(2**31))


@triton_kernel("topk_indices", provides=CLAIMS)
def topk_indices(tuning: Tuning, scores: Tensor, seq_lens: Tensor, *, top_k: int) -> Tensor:
    out = seq_lens.new_empty(len(scores), top_k)
    choose(tuning, Scores(scores, seq_lens.contiguous(), 0), None, out)
    return out


@dataclass(frozen=True)
class Scores:
    """``values [T, S]`` of places start, start + 1, ... of each row; places from ``lengths [T]`` on do not count."""

    values: Tensor
    lengths: Tensor
    start: int


@dataclass(frozen=True)
class Best:
    """What was chosen, with its keys: places ``[T, k]`` int32, ascending, -1 at the tail."""

    places: Tensor
    keys: Tensor


def choose(tuning: Tuning, scores: Scores, best: Best | None, out: Tensor) -> None:
    """The places ``out [T, k]`` of the best of each row, among ``best`` and the scores, which come after it."""
    _choose(tuning, scores, best, out, None)


def better(tuning: Tuning, scores: Scores, best: Best | None, top_k: int) -> Best:
    """The same, with keys, so that a choice can go on."""
    found = Best(*(scores.lengths.new_empty(len(scores.lengths), top_k) for _ in range(2)))
    _choose(tuning, scores, best, found.places, found.keys)
    return found


def _choose(tuning: Tuning, scores: Scores, best: Best | None, out: Tensor, out_keys: Tensor | None) -> None:
    sizes = dict(tuning["topk_indices"])
    programs, least, most = (sizes.pop(name) for name in ("PROGRAMS", "SPAN", "BLOCK"))
    (T, S), top_k, bits = scores.values.shape, out.shape[1], BITS[scores.values.dtype]
    column = tl.int32 if S * scores.values.stride(1) < 2**31 else addresses(tuning)
    known, width, lengths, start, fresh = 0 if best is None else top_k, S, scores.lengths, scores.start, True
    while True:
        n = known + width
        even = triton.cdiv(n, max(programs // max(T, 1), 1))
        span = triton.cdiv(max(even, least, 4 * top_k), LEAST) * LEAST
        if 4 * top_k <= most:  # else so much of a block would be kept that cutting is in vain
            span = min(span, max(most // LEAST, 1) * LEAST)
        parts = max(triton.cdiv(n, span), 1)
        block = min(most, max(LEAST, triton.next_power_of_2(min(span, n))))
        cut = Best(*(lengths.new_empty(T, parts * top_k) for _ in range(2))) if parts > 1 else None
        places, keys = (out, out_keys) if cut is None else (cut.places, cut.keys)
        counts = lengths if cut is None else lengths.new_empty(T)
        old = Best(places, places) if best is None else best  # pointers that are not read
        launch(
            _best, (T * parts,), out, scores.values, lengths, old.places, old.keys,
            places, places if keys is None else keys, counts,
            *scores.values.stride(), old.places.stride(0), known, width, start, parts, span, top_k,
            KNOWN=best is not None, FRESH=fresh, KEEP=keys is not None, BITS=bits, CUT=cut is not None,
            ONE=min(span, n) <= block, BLOCK=block, INDEX=addresses(tuning), COLUMN=column, **sizes,
        )  # fmt: skip
        if cut is None:
            return
        best, known, width, lengths, start, fresh = cut, 0, parts * top_k, counts, 0, False


# One form for all numbers.
@triton.jit(do_not_specialize=("known", "width", "start", "parts", "span", "k"))
def _best(
    scores, lengths, old_places, old_keys, places, keys, counts,
    scores_row, scores_col, old_row, known, width, start, parts, span, k,
    KNOWN: tl.constexpr, FRESH: tl.constexpr, KEEP: tl.constexpr, BITS: tl.constexpr,
    CUT: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """The best of columns [first, stop) of a row: ``known`` columns of old keys, then scores; or old keys only."""
    program = tl.program_id(0)
    row = program // parts
    first = tl.multiple_of((program % parts) * span, ALIGNED)
    n = known + tl.minimum(tl.maximum(tl.load(lengths + row) - start, 0), width)
    stop = tl.minimum(first + span, n)
    scores += row.to(INDEX) * scores_row
    old_places += row.to(INDEX) * old_row
    old_keys += row.to(INDEX) * old_row
    if CUT:
        tl.store(counts + row, (n + span - 1) // span * k, mask=first == 0)
    lane = tl.arange(0, BLOCK)
    if ONE:
        key = _keys_of(scores, old_keys, first + lane, stop, known, scores_col, KNOWN, FRESH, BITS, COLUMN)
    level = tl.full((), NONE >> (32 - BITS), tl.int32)
    room = tl.full((), 0, tl.int32)
    if stop - first > k:
        if ONE:
            level, room = _kth(key, k, BITS)
        else:
            level = tl.full((), 0, tl.int32)
            room += k
            shift = tl.full((), BITS - 8, tl.int32)
            bias = tl.full((), 128, tl.int32)  # the first digit has the sign
            for _ in range(BITS // 8):
                found = tl.zeros((256,), tl.int32)
                for at in range(first, stop, BLOCK):
                    some = _keys_of(scores, old_keys, at + lane, stop, known, scores_col, KNOWN, FRESH, BITS, COLUMN)
                    found += _counts(some, level, shift, bias)
                # From a digit and above. The k-th place has the highest digit from which on there are enough.
                reached = (stop - first + BLOCK - 1) // BLOCK * BLOCK - tl.cumsum(found, 0) + found
                digit = tl.sum((reached >= room).to(tl.int32), 0) - 1
                room -= tl.max(tl.where(reached < room, reached, 0), 0)
                level = (level << 8) + digit - bias
                shift -= 8
                bias = bias * 0
        room = tl.where(level == NONE >> (32 - BITS), 0, room)

    places += program.to(INDEX) * k
    keys += program.to(INDEX) * k
    above = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for at in range(first, stop, BLOCK):
        col = at + lane
        if not ONE:
            key = _keys_of(scores, old_keys, col, stop, known, scores_col, KNOWN, FRESH, BITS, COLUMN)
        # Two counts in one number: a block has fewer than 2^15 columns.
        count = (key > level).to(tl.int32) + ((key == level).to(tl.int32) << 16)
        upto = tl.cumsum(count, 0)
        equals = equal + (upto >> 16)
        chosen = (key > level) | ((key == level) & (equals <= room))
        slot = above + (upto & 0xFFFF) + tl.minimum(equals, room) - 1
        place = col - known + start
        if KNOWN:
            was = chosen & (col < known) if FRESH else chosen
            place = tl.where(was, tl.load(old_places + col, mask=was, other=0), place)
        tl.store(places + slot, place, mask=chosen)
        if KEEP:
            tl.store(keys + slot, key, mask=chosen)
        count = tl.sum(count, 0)
        above += count & 0xFFFF
        equal += count >> 16
    for at in range(above + tl.minimum(equal, room), k, 1024):
        col = at + tl.arange(0, 1024)
        tl.store(places + col, -1, mask=col < k)
        if KEEP:
            tl.store(keys + col, NONE >> (32 - BITS), mask=col < k)


@triton.jit
def _kth(key, k, BITS: tl.constexpr):
    """(level, room): the best ``k`` of these keys are those above ``level``, and ``room`` of those at it."""
    level = tl.full((), NONE >> (32 - BITS), tl.int32)
    above = tl.full((), 0, tl.int32)
    at = tl.full((), 0, tl.int32)  # the highest bit of a key is its sign
    step = tl.full((), 1 << (BITS - 2), tl.int32)
    left = tl.full((), BITS, tl.int32)
    while left > 0:
        reach = tl.sum((key >= at).to(tl.int32), 0)
        level = tl.where(reach > k, at, tl.where(reach == k, at - 1, level))
        above = tl.where(reach > k, above, reach)
        left = tl.where(reach == k, 0, left - 1)
        at = level + step
        step = step >> 1
    return level, k - above


@triton.jit
def _keys_of(
    scores, old_keys, col, stop, known, scores_col,
    KNOWN: tl.constexpr, FRESH: tl.constexpr, BITS: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Keys of these columns, the leading ``BITS`` of them; NONE at and beyond ``stop``."""
    if FRESH:
        here = col < stop
        at = col
        if KNOWN:
            here = here & (col >= known)
            at = col - known
        score = tl.load(scores + at.to(COLUMN) * scores_col, mask=here, other=0).to(tl.float32)
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(bits == NONE, 0, bits)  # -0.0 equals +0.0
        size = bits & 0x7FFFFFFF
        infinite = 0x7F800000
        eligible = here & (size <= infinite) & ((size < infinite) | (bits > 0))
        key = tl.where(eligible, bits ^ ((bits >> 31) & 0x7FFFFFFF), NONE) >> (32 - BITS)
        if KNOWN:
            was = (col < stop) & (col < known)
            key = tl.where(was, tl.load(old_keys + col, mask=was, other=0), key)
    else:
        key = tl.load(old_keys + col, mask=col < stop, other=NONE >> (32 - BITS))
    return key


@triton.jit
def _counts(key, level, shift, bias):
    """How many keys that agree with ``level`` so far have each digit. Others count as 0, below all of interest."""
    digits = key >> shift
    agrees = (bias > 0) | ((digits >> 8) == level)
    return tl.histogram(tl.where(agrees, (digits + bias) & 255, 0), 256)
