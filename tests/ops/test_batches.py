"""Sample batches: unused entries of the block table, unread bytes, caches without pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glm5_hal.conformance.inputs import Draw
from glm5_hal.formats import FORMATS, CacheFormat
from glm5_hal.ops._common import batches, caches

LENS = ((1, 9), (2, 24), (0, 0), (3, 1))


def test_unused_entries_of_the_block_table_name_a_page_that_no_request_uses() -> None:
    batch = batches.paged(Draw(0, "table"), LENS, 8)
    used = set(batch.block_table[~batch.unused_table].tolist())
    assert len(used) == 6
    spare = set(batch.block_table[batch.unused_table].tolist())
    assert len(spare) == 1
    assert not spare & used
    assert spare <= set(range(batch.num_blocks))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_the_masks_cover_just_what_is_not_read(fmt: CacheFormat) -> None:
    draw = Draw(0, fmt.name)
    batch = batches.paged(draw, LENS, 8)
    keys = int(batch.seq_lens.sum())
    rope = draw.normal(keys, 16) if fmt.kind == "latent" else None
    held, unread = batches.filled(fmt, batch, draw.normal(keys, 128), rope)
    read = caches.read(fmt, held, batch.used_slots(), 128)
    other = tuple(h.masked_fill(m, 93) for h, m in zip(held, unread, strict=True))
    for a, b in zip(read, caches.read(fmt, other, batch.used_slots(), 128), strict=True):
        assert a is None or torch.equal(a, b)  # type: ignore[arg-type]
    total = sum(t.numel() for t in held)
    assert sum(int(m.sum()) for m in unread) == total - total * keys // (batch.num_blocks * 8)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_a_cache_without_pages_is_written_and_read(fmt: CacheFormat) -> None:
    dims = (128, 16) if fmt.kind == "latent" else (128,)
    held = fmt.allocate(0, 8, *dims, dtype=torch.float32)
    none = torch.zeros(0, dtype=torch.long)
    rope: Tensor | None = torch.zeros(0, 16) if fmt.kind == "latent" else None
    caches.write(fmt, held, none, torch.zeros(0, 128), rope)
    latent, found = caches.read(fmt, held, none, 128)
    assert latent.shape == (0, 128)
    assert (found is None) == (rope is None)
    assert found is None or found.shape == (0, 16)


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.group], ids=lambda f: f.name)
def test_the_parts_of_a_row_are_its_bytes_once_each(fmt: CacheFormat) -> None:
    dims = (256, 16) if fmt.kind == "latent" else (256,)
    (cache,) = fmt.allocate(3, 4, *dims, dtype=torch.bfloat16)
    cache.copy_(torch.arange(cache.numel()).view(cache.shape))
    parts = caches.fields(fmt, (cache,), 256)
    assert tuple(parts) == fmt.fields
    assert {name: p.shape[-1] for name, p in parts.items()} == caches.field_widths(fmt, cache.shape[-1], 256)
    rows = [p.flatten(1) if fmt.block_major else p for p in parts.values()]
    assert torch.equal(torch.cat(rows, -1).flatten(), cache.flatten())
