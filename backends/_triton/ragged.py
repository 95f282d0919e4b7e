"""Ragged batches on the device: which request a token, or a block of rows, belongs to. No length is read by the host.

Legend: B requests (or experts), n tokens of one request.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owner(place, offsets, B, BLOCK_B: tl.constexpr):
    """The request that token ``place`` belongs to: how many of the offsets [1..B] lie at or before it."""
    i = tl.arange(0, BLOCK_B)
    ends = tl.load(offsets + 1 + i, mask=i < B, other=2147483647)
    return tl.sum((ends <= place).to(tl.int32), 0)


@triton.jit
def keys_seen(token, request, offsets, seq_lens):
    """How many keys of its request a token sees under the causal mask, bottom-right aligned; never negative."""
    start = tl.load(offsets + request)
    stop = tl.load(offsets + request + 1)
    return tl.maximum(tl.load(seq_lens + request) - (stop - start) + (token - start) + 1, 0)


@triton.jit
def block_of(program, offsets, B, ROWS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Program p works on block p of all requests' blocks of ``ROWS`` rows, none of which spans two requests.

    Gives (request, first row of the block, end of the request's rows); request B where there are fewer blocks. There
    are at most ceil(rows / ROWS) + B of them.
    """
    i = tl.arange(0, BLOCK_B)
    here = i < B
    starts = tl.load(offsets + i, mask=here, other=0)
    stops = tl.load(offsets + 1 + i, mask=here, other=0)
    upto = tl.cumsum((stops - starts + ROWS - 1) // ROWS, 0)
    before = here & (upto <= program)
    request = tl.sum(before.to(tl.int32), 0)
    done = tl.max(tl.where(before, upto, 0), 0)
    start = tl.sum(tl.where(i == request, starts, 0), 0)
    stop = tl.sum(tl.where(i == request, stops, 0), 0)
    return request, start + (program - done) * ROWS, stop
