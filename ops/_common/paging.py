"""Ragged batches over paged caches: which request and which slots a token's keys are in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from glm5_hal.plan import host_list
from glm5_hal.spec import Arg

#: Where each request's keys and new tokens are: what every op takes that reads a paged cache.
BATCH = (
    Arg("block_table", "B M", "int32", "physical page of each logical page of each request"),
    Arg("seq_lens", "B", "int32", "cached keys of each request, new tokens included"),
    Arg("cu_seqlens_q", "B+1", "int32", "offsets of each request's tokens"),
)


def offsets(lengths: Sequence[int]) -> Tensor:
    """Cumulative lengths with a leading 0, int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def requests(cu_seqlens_q: Tensor, seq_lens: Tensor) -> Iterator[tuple[int, slice, int]]:
    """(request, its query tokens, its number of cached keys), in order."""
    offsets, lengths = host_list(cu_seqlens_q), host_list(seq_lens)
    for r, length in enumerate(lengths):
        yield r, slice(offsets[r], offsets[r + 1]), length


def slots_of(block_table_row: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Flat cache slots of local key positions, through one request's row of the block table."""
    return block_table_row[positions // page_size].long() * page_size + positions % page_size


def causal_limits(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """How many keys each query of a request sees, bottom-right aligned: the last query sees all. May be 0 or less."""
    return torch.arange(1, num_queries + 1, device=device) + (num_keys - num_queries)
