"""Values that must be in range. These read tensor values: on a device that syncs (see hal.use(check=...))."""

from __future__ import annotations

import itertools

from torch import Tensor

from glm5_hal.errors import HalError


def in_range(op: str, name: str, tensor: Tensor, low: int, high: int, why: str) -> None:
    """Every element of an integer tensor is in [low, high)."""
    if tensor.numel() == 0:
        return
    smallest, largest = (int(v) for v in tensor.aminmax())
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        where = (tensor == wrong).nonzero()[0].tolist()
        raise HalError(
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
    for r, length in enumerate(seq_lens.tolist()):
        used = block_table[r, : -(-length // page_size)]
        in_range(op, f"block_table[{r}]", used, 0, num_blocks, f"the cache has {num_blocks} pages")


def slots(op: str, slot_mapping: Tensor, cache: Tensor) -> None:
    """Slots exist in the cache; -1 skips the token."""
    total = cache.shape[0] * cache.shape[1]
    in_range(op, "slot_mapping", slot_mapping, -1, total, f"the cache has {total} slots, -1 skips a token")
