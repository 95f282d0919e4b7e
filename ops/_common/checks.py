"""Values that must be in range. These read tensor values: on a device that syncs (see hal.use(check=...))."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.errors import HalError


def in_range(op: str, name: str, tensor: Tensor, low: int, high: int, why: str, *, among: Tensor | None = None) -> None:
    """Every element of an integer tensor, or every one ``among`` them (a mask), is in [low, high)."""
    looked_at = tensor if among is None else tensor[among]
    if not _within(looked_at, low, high):
        smallest, largest = (int(v) for v in looked_at.aminmax())
        wrong = smallest if smallest < low else largest
        found = tensor == wrong if among is None else (tensor == wrong) & among
        raise _out_of_range(op, name, found.nonzero()[0].tolist(), wrong, low, high, why)


def _within(tensor: Tensor, low: int, high: int) -> bool:
    """Whether every element is in [low, high): one pass, which most calls need no second one after."""
    if tensor.numel() == 0:
        return True
    smallest, largest = tensor.aminmax()
    return low <= int(smallest) and int(largest) < high


def _out_of_range(op: str, name: str, where: list[int], wrong: int, low: int, high: int, why: str) -> HalError:
    return HalError(
        "VALUE",
        f"{op}: {name}{where} is {wrong}; it must be in [{low}, {high}): {why}",
        value=wrong,
        fix=f"look at how {name} was built",
    )


def offsets(op: str, name: str, cumulative: Tensor, total: int, what: str) -> None:
    """Cumulative offsets start at 0, never fall, and end at ``total``."""
    values = cumulative.tolist()
    falls = any(b < a for a, b in itertools.pairwise(values))
    if not values or values[0] != 0 or falls or values[-1] != total:
        raise HalError(
            "VALUE",
            f"{op}: {name} must start at 0, not fall, and end at {total}, the number of {what}; got {values[:8]}"
            f"{'...' if len(values) > 8 else ''} ending at {values[-1] if values else None}",
            value=values,
            fix=f"build {name} with torch.cumsum over the lengths, with a leading 0",
        )


def paged(op: str, block_table: Tensor, seq_lens: Tensor, cache: Tensor) -> None:
    """Lengths fit the block table, and every page that a length reaches exists. Entries beyond it are never read."""
    num_blocks, page_size = cache.shape[0], cache.shape[1]
    capacity = block_table.shape[1] * page_size
    in_range(op, "seq_lens", seq_lens, 0, capacity + 1, f"the block table has room for {capacity} keys per request")
    if _within(block_table, 0, num_blocks):
        return
    starts = torch.arange(block_table.shape[1], device=seq_lens.device) * page_size
    why = f"the cache has {num_blocks} pages"
    in_range(op, "block_table", block_table, 0, num_blocks, why, among=starts < seq_lens[:, None])


def batch(op: str, args: Mapping[str, Any], cache: str) -> None:
    """Queries of requests over a paged cache: offsets, lengths and pages."""
    offsets(op, "cu_seqlens_q", args["cu_seqlens_q"], args["q"].shape[0], "query tokens")
    paged(op, args["block_table"], args["seq_lens"], args[cache])


def chosen(op: str, indices: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor) -> None:
    """Each token's indices are positions in its own request, or -1. The offsets have been checked."""
    if indices.numel() == 0 or _within(indices, -1, int(seq_lens.amin())):
        return
    lengths = seq_lens.repeat_interleave(cu_seqlens_q.diff(), output_size=len(indices))
    low, high = indices.aminmax(dim=-1)
    outside = (low < -1) | (high >= lengths)
    if outside.any():
        t = int(outside.nonzero()[0])
        length, smallest = int(lengths[t]), int(low[t])
        wrong = smallest if smallest < -1 else int(high[t])
        where = [t, int((indices[t] == wrong).nonzero()[0])]
        why = f"the request of token {t} has {length} keys, -1 is no key"
        raise _out_of_range(op, "indices", where, wrong, -1, length, why)


def slots(op: str, slot_mapping: Tensor, cache: Tensor) -> None:
    """Slots exist in the cache; -1 skips the token."""
    total = cache.shape[0] * cache.shape[1]
    in_range(op, "slot_mapping", slot_mapping, -1, total, f"the cache has {total} slots, -1 skips a token")
