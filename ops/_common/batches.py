"""Sample inputs of paged, ragged batches: shuffled block tables, unused pages and tails, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import CacheFormat
from glm5_hal.ops._common import caches
from glm5_hal.ops._common.paging import offsets, slots_of
from glm5_hal.spec import Draw

#: Spare pages that lie among those in use.
NEAR = 100

#: More requests than a warp has lanes, each of a few keys.
MANY_REQUESTS = tuple((1, 4 + i % 5) for i in range(33))


@dataclass(frozen=True)
class Batch:
    """Requests of ``lens[r] = (new tokens, cached keys)``, on pages that are shuffled over a larger cache."""

    lens: tuple[tuple[int, int], ...]
    page_size: int
    num_blocks: int
    block_table: Tensor
    unused_table: Tensor

    @property
    def tokens(self) -> int:
        return sum(q for q, _ in self.lens)

    @property
    def seq_lens(self) -> Tensor:
        return torch.tensor([s for _, s in self.lens], dtype=torch.int32)

    @property
    def cu_seqlens_q(self) -> Tensor:
        return offsets([q for q, _ in self.lens])

    @property
    def max_seq_len(self) -> int:
        return max((s for _, s in self.lens), default=0)

    def used_slots(self) -> Tensor:
        """Flat slots of every cached key, request by request."""
        rows = [slots_of(self.block_table[r], torch.arange(s), self.page_size) for r, (_, s) in enumerate(self.lens)]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)

    def visible(self) -> Tensor:
        """How many keys each token sees under the causal mask, never negative, [T]."""
        rows = [torch.arange(s - q + 1, s + 1) for q, s in self.lens]
        return torch.cat(rows).clamp_min(0) if rows else torch.zeros(0, dtype=torch.long)


def paged(draw: Draw, lens: Sequence[tuple[int, int]], page_size: int, spare: int = 3) -> Batch:
    """A batch whose pages lie shuffled among ``spare`` ones that no request uses. Unused entries of the block table
    name one of these: what is read through them is nobody's key."""
    need = [-(-s // page_size) for _, s in lens]
    total = sum(need)
    shuffled = min(spare, NEAR)  # of more spare pages, the rest lies before all that are used
    order = draw.permutation(total + shuffled).int() + (spare - shuffled)
    table = torch.full((len(lens), max(need, default=0) + 1), int(order[total]) if spare else -1, dtype=torch.int32)
    unused = torch.ones_like(table, dtype=torch.bool)
    start = 0
    for r, n in enumerate(need):
        table[r, :n] = order[start : start + n]
        unused[r, :n] = False
        start += n
    return Batch(tuple((q, s) for q, s in lens), page_size, total + spare, table, unused)


def filled(
    fmt: CacheFormat, batch: Batch, latent: Tensor, rope: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The format's tensors with these rows in the used slots, and masks of everything that must not be read."""
    dims, slots = (latent.shape[-1],) if rope is None else (latent.shape[-1], rope.shape[-1]), batch.used_slots()

    def around(garbage: int) -> tuple[Tensor, ...]:
        cache = fmt.allocate(batch.num_blocks, batch.page_size, *dims, dtype=latent.dtype)
        for tensor in cache:
            tensor.fill_(garbage)
        caches.write(fmt, cache, slots, latent, rope)
        return cache

    made = around(7)  # finite as a number and as an e4m3 byte: a stray read gives a wrong value, not a crash
    if fmt.group:  # a row may hold the garbage byte by chance: what is unread differs between two fillings
        return made, tuple(a != b for a, b in zip(made, around(119), strict=True))
    mask = torch.ones(batch.num_blocks * batch.page_size, 1, dtype=torch.bool)
    mask[slots] = False
    grid = mask.view(batch.num_blocks, batch.page_size, 1)
    return made, tuple(grid.expand_as(c).clone() for c in made)


def as_args(fmt: CacheFormat, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    """The format's tensors under the names that ops give them; a latent format of one tensor has no rope_cache."""
    named: dict[str, Any] = dict(zip(fmt.tensors, tensors, strict=True))
    if fmt.kind == "latent":
        named.setdefault("rope_cache", None)
    return named
