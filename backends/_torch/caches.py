"""Paged caches: rows read as numbers, tile by tile, and the two ops that write them.

Legend: N pages, P page size, n rows of a tile, L latent (or index key) width, R rope width, w width of a field.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._torch.numbers import in_host_memory
from glm5_hal.formats import FORMATS, CacheFormat
from glm5_hal.ops._common import caches as bytes_of


class Tiles:
    """Rows of a paged cache as numbers ``[n, L+R]``, read into the same buffer again and again.

    Nothing is read but the rows that are asked for. They are converted once per tile and multiplied in ``dtype``:
    products in bfloat16 would round the scores, and those in float16 run at 1 GFLOP/s on a CPU.
    """

    def __init__(
        self, fmt: CacheFormat, caches: tuple[Tensor, ...], latent: int, rope: int, dtype: torch.dtype, most: int
    ) -> None:
        """At most ``most`` rows are read at a time."""
        cache = caches[0]
        self._fmt, self._latent, self._page = fmt, latent, cache.shape[1]
        self._tile = cache.new_empty(most, latent + rope, dtype=dtype)
        self._fields = bytes_of.fields(fmt, caches, latent)
        # Numbers that need no conversion go straight into the tile.
        self._whole = len(self._fields) == 1 and cache.dtype == dtype
        self._raw = {
            name: self._tile if self._whole else field.new_empty(most, field.shape[-1])
            for name, field in self._fields.items()
        }
        self._bits = cache.new_empty(2, most if fmt.group else 0, latent, dtype=torch.int16)

    def between(self, pages: Tensor, start: int, stop: int) -> Tensor:
        """The keys at local positions start to stop of a request; ``pages`` is its row of the block table."""
        P = self._page
        first, last = start // P, -(-stop // P)
        here = slice(start - first * P, stop - first * P)
        page = pages[first:last].long()[:, None].expand(-1, P).flatten()[here]
        return self.numbers(self._gathered(page, torch.arange(P, device=pages.device).repeat(last - first)[here]))

    def at(self, pages: Tensor, positions: Tensor) -> Tensor:
        """The keys at any local positions."""
        return self.numbers(self.rows(pages, positions))

    def rows(self, pages: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """The same as the cache has them, by field."""
        return self._gathered(pages.index_select(0, positions // self._page).long(), positions % self._page)

    def latents(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Latents ``[n, L]`` of such rows, of a format that has them as numbers."""
        return rows[self._fmt.tensors[0]][:, : self._latent]

    def _gathered(self, page: Tensor, offset: Tensor) -> dict[str, Tensor]:
        n = len(page)
        return {name: _gather(field, page, offset, self._raw[name][:n]) for name, field in self._fields.items()}

    def numbers(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Rows as the cache has them, converted."""
        n = len(next(iter(raw.values())))
        tile = self._tile[:n]
        if self._fmt.group:
            _decode_e4m3(raw["latent"], self._bits[:, :n], tile[:, : self._latent])
            groups = tile[:, : self._latent].view(n, -1, self._fmt.group)
            groups.mul_(raw["scale"].view(torch.float32)[..., None])
            if "rope" in raw:
                tile[:, self._latent :].copy_(raw["rope"].view(torch.bfloat16))
        elif not self._whole:
            start = 0
            for rows in raw.values():
                tile[:, start : start + rows.shape[-1]].copy_(rows)
                start += rows.shape[-1]
        return tile


def _rows(field: Tensor) -> tuple[Tensor, int] | None:
    """``[N, P, w]`` as ``[rows, w]``, and how many rows one page is from the next; None if that is no whole number."""
    N, P, w = field.shape
    apart, row, _ = field.stride()
    if N == 1:
        return field[0], P
    if P == 1:
        return field[:, 0], 1
    if row == 0 or apart % row:
        return None
    return field.as_strided(((N - 1) * (apart // row) + P, w), (row, 1)), apart // row


def _gather(field: Tensor, page: Tensor, offset: Tensor, out: Tensor) -> Tensor:
    """``field[page, offset]``; index_select takes a fifth of the time of that."""
    found = _rows(field)
    if found is None:
        return out.copy_(field[page, offset])
    rows, apart = found
    return torch.index_select(rows, 0, page * apart + offset, out=out)


def _decode_e4m3(codes: Tensor, room: Tensor, out: Tensor) -> None:
    """Numbers of e4m3 codes ``[n, L]``; ``room [2, n, L]`` int16 is scratch.

    As float16, the bits of a code one byte higher are its value / 256: the exponent has one bit more and a bias of 8
    more; subnormals fit too. Six times as fast as the cast where there is no instruction for it; needs no fp8 dtype.
    """
    bits, nan = room
    bits.copy_(codes.view(torch.int8)).mul_(128).bitwise_and_(~0x4000)  # the sign had been extended over bit 14
    # Only code 0x7F is all ones below its sign: one more carries into bit 14, and that bit makes it a NaN.
    torch.bitwise_and(bits, 0x3F80, out=nan).add_(0x80).bitwise_and_(0x4000)
    out.copy_(bits.bitwise_or_(nan).view(torch.float16)).mul_(256.0)


@kernel("mla_cache_write", "torch", provides=("deterministic", "batch_invariant", "graph_safe"))
def mla_cache_write(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    rope_cache: Tensor | None = None,
    *,
    cache_format: str = "latent_576",
) -> None:
    _write(FORMATS[cache_format], bytes_of.held(kv_cache, rope_cache), slot_mapping, kv_c, k_pe)


@kernel("index_cache_write", "torch", provides=("deterministic", "batch_invariant", "graph_safe"))
def index_cache_write(k: Tensor, index_cache: Tensor, slot_mapping: Tensor, *, cache_format: str = "bf16_128") -> None:
    _write(FORMATS[cache_format], (index_cache,), slot_mapping, k, None)


def _write(fmt: CacheFormat, caches: tuple[Tensor, ...], slots: Tensor, latent: Tensor, rope: Tensor | None) -> None:
    if slots.numel() == 0 or caches[0].numel() == 0:
        return
    wanted = slots >= 0
    some = None if in_host_memory(slots) else wanted
    if some is None and not wanted.all():
        slots, latent, rope = slots[wanted], latent[wanted], None if rope is None else rope[wanted]
    fields = bytes_of.fields(fmt, caches, latent.shape[-1])
    for name, rows in _stored(fmt, caches, latent, rope).items():
        _put(fields[name], slots, rows, some)


def _stored(fmt: CacheFormat, caches: tuple[Tensor, ...], latent: Tensor, rope: Tensor | None) -> Mapping[str, Tensor]:
    """What each field gets."""
    if fmt.group:
        codes, scale = bytes_of.quantise(latent, fmt)
        made = {"latent": codes, "scale": scale.view(torch.uint8)}
        return made if rope is None else {**made, "rope": rope.to(torch.bfloat16).contiguous().view(torch.uint8)}
    parts = [latent] if rope is None else [latent, rope]
    rows = parts if len(parts) == len(caches) else [torch.cat(parts, -1)]
    return {name: r.to(c.dtype) for name, r, c in zip(fmt.tensors, rows, caches, strict=True)}


def _put(field: Tensor, slots: Tensor, rows: Tensor, wanted: Tensor | None) -> None:
    """Store ``rows [n, w]`` at ``slots [n]``; only the ``wanted`` ones, if that is given."""
    page, offset = slots // field.shape[1], slots % field.shape[1]
    if wanted is not None:
        page, offset, rows = _doubled(field, page, offset, rows, wanted)
    found = _rows(field)
    if found is None:
        field[page, offset] = rows
    else:
        found[0].index_copy_(0, page * found[1] + offset, rows)


def _doubled(
    field: Tensor, page: Tensor, offset: Tensor, rows: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Unwanted rows made copies of the first wanted one, place and all, so that they write nothing of their own. Where
    none is wanted, all write to slot 0 what is there. How many are wanted is never asked."""
    first = wanted.int().argmax(keepdim=True)
    some = wanted.index_select(0, first)
    spare_page = torch.where(some, page.index_select(0, first), 0)
    spare_offset = torch.where(some, offset.index_select(0, first), 0)
    spare = torch.where(some, rows.index_select(0, first), field[spare_page, spare_offset])
    return (
        torch.where(wanted, page, spare_page),
        torch.where(wanted, offset, spare_offset),
        torch.where(wanted[:, None], rows, spare),
    )
