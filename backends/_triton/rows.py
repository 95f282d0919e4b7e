"""Rows of paged caches in every named format, read as numbers. No fp8 type is needed: e4m3 is decoded bit by bit.

Legend: N pages, P page size, n rows of a tile, L latent (or index key) width, R rope width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.formats import CacheFormat
from glm5_hal.ops._common import caches as bytes_of


@dataclass(frozen=True)
class Fields:
    """What a row is made of: views ``[N, P, w]`` of the caches. ``scale`` and a quantised row's ``rope`` are bytes."""

    latent: Tensor
    rope: Tensor | None
    scale: Tensor | None
    group: int

    @property
    def args(self) -> tuple[object, ...]:
        """For a kernel: pointer, stride of pages and stride of rows of the latent, the rope and the scale."""
        found: list[object] = []
        for field in (self.latent, self.rope, self.scale):
            given = self.latent if field is None else field  # a pointer that is not read
            found += [given, given.stride(0), given.stride(1)]
        return tuple(found)

    def compute(self, activations: torch.dtype) -> tl.dtype:
        """In which type rows are multiplied: that of the activations, unless numbers of the cache do not fit it."""
        narrow = activations == torch.float16 and self.group
        return tl.float32 if narrow else getattr(tl, str(activations).removeprefix("torch."))


def fields(fmt: CacheFormat, caches: tuple[Tensor, ...], latent: int) -> Fields:
    parts = bytes_of.fields(fmt, caches, latent)
    if fmt.group:
        return Fields(parts["latent"], parts.get("rope"), parts["scale"], fmt.group)
    first, *second = parts.values()
    rope = second[0] if second else first[..., latent:] if fmt.kind == "latent" else None
    return Fields(first[..., :latent], rope, None, 0)


@triton.jit
def latent_rows(
    latent, latent_page, latent_row, scale, scale_page, scale_row,
    page, slot, some, L,
    BLOCK_L: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The rows ``slot [n]`` of pages ``page [n]`` as numbers [n, BLOCK_L] of TYPE, 0 where not ``some [n]``."""
    col = tl.arange(0, BLOCK_L)
    at = page * latent_page + slot * latent_row
    here = some[:, None] & (col < L)[None, :]
    raw = tl.load(latent + at[:, None] + col[None, :], mask=here, other=0)
    if GROUP == 0:
        return raw.to(TYPE)
    group = tl.arange(0, BLOCK_L // GROUP)
    base = (page * scale_page + slot * scale_row)[:, None] + 4 * group[None, :]
    scales = _number32(scale + base, some[:, None] & (group * GROUP < L)[None, :])
    values = tl.reshape(_e4m3(raw), (page.shape[0], BLOCK_L // GROUP, GROUP)) * scales[:, :, None]
    return tl.reshape(values, (page.shape[0], BLOCK_L)).to(TYPE)


@triton.jit
def rope_rows(
    rope, rope_page, rope_row, page, slot, some, R, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr
):
    """The rope parts of these rows, [n, BLOCK_R] of TYPE."""
    col = tl.arange(0, BLOCK_R)
    at = page * rope_page + slot * rope_row
    here = some[:, None] & (col < R)[None, :]
    if GROUP == 0:
        return tl.load(rope + at[:, None] + col[None, :], mask=here, other=0).to(TYPE)
    byte = rope + at[:, None] + 2 * col[None, :]
    low = tl.load(byte, mask=here, other=0).to(tl.int32)
    high = tl.load(byte + 1, mask=here, other=0).to(tl.int32)
    return ((high << 24) | (low << 16)).to(tl.float32, bitcast=True).to(TYPE)


@triton.jit
def _number32(byte, here):
    """fp32 numbers of four bytes each, low byte first; nothing is aligned."""
    bits = tl.load(byte, mask=here, other=0).to(tl.int32)
    bits |= tl.load(byte + 1, mask=here, other=0).to(tl.int32) << 8
    bits |= tl.load(byte + 2, mask=here, other=0).to(tl.int32) << 16
    bits |= tl.load(byte + 3, mask=here, other=0).to(tl.int32) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(codes):
    """fp32 numbers of e4m3 codes: as float16, the bits of a code one byte higher are its value / 256."""
    code = codes.to(tl.int32)
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    value = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)
