"""Rows of paged caches in every named format, read as numbers. No fp8 type is needed: e4m3 is decoded bit by bit.

Legend: N pages, P page size, w width of a field, n rows of a tile, L latent (or index key) width, R rope width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.formats import CacheFormat
from glm5_hal.ops._common import caches as bytes_of

#: Bytes that a thread loads at once, at most: rope keys that begin at multiples of it are read as numbers.
ALIGNED = 16


@dataclass(frozen=True)
class Fields:
    """What a row is made of: views ``[N, P, w]`` of the caches.

    A quantised row's ``scale`` and ``rope`` are the bits of its numbers, int32 and int16; or bytes, where they do not
    lie aligned, which no format promises.
    """

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
        rope = _bits(parts["rope"], torch.int16, ALIGNED) if "rope" in parts else None
        return Fields(parts["latent"], rope, _bits(parts["scale"], torch.int32, 4), fmt.group)
    first, *second = parts.values()
    rope = second[0] if second else first[..., latent:] if fmt.kind == "latent" else None
    return Fields(first[..., :latent], rope, None, 0)


def _bits(field: Tensor, dtype: torch.dtype, aligned: int) -> Tensor:
    """The bytes as integers of ``dtype``, where every row begins at a multiple of ``aligned`` bytes."""
    places = (field.data_ptr(), field.storage_offset(), *field.stride()[:-1])
    return field if any(place % aligned for place in places) else field.view(dtype)


@triton.jit
def latent_rows(
    latent, at, scale, at_scale, some,
    L: tl.constexpr, BLOCK_L: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """The rows that lie at ``at [n]``, with their scales at ``at_scale [n]``, as numbers [n, BLOCK_L] of TYPE; 0 where
    not ``some [n]``, and from column L on."""
    col = tl.arange(0, BLOCK_L)
    here = some[:, None]
    if L % BLOCK_L:
        here = here & (col < L)[None, :]
    raw = tl.load(latent + at[:, None] + col[None, :], mask=here, other=0)
    if GROUP == 0:  # and else, not an early return: what follows one is compiled too
        values = raw
    else:
        group = tl.arange(0, BLOCK_L // GROUP)
        scales = _number32(scale, at_scale[:, None], group[None, :], some[:, None] & (group * GROUP < L)[None, :])
        values = tl.reshape(_e4m3(raw, FP8), (at.shape[0], BLOCK_L // GROUP, GROUP)) * scales[:, :, None]
        values = tl.reshape(values, (at.shape[0], BLOCK_L))
    return values.to(TYPE)


@triton.jit
def rope_rows(rope, at, some, R, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr):
    """The rope parts of rows, which begin at offsets ``at [n]``: [n, BLOCK_R] of TYPE."""
    col = tl.arange(0, BLOCK_R)
    here = some[:, None] & (col < R)[None, :]
    if GROUP == 0:
        values = tl.load(rope + at[:, None] + col[None, :], mask=here, other=0)
    else:
        if rope.dtype.element_ty == tl.int16:
            at = tl.multiple_of(at, 8)  # ALIGNED, in numbers
        values = _number16(rope, at[:, None], col[None, :], here)
    return values.to(TYPE)


@triton.jit
def _number32(field, first, i, here):
    """fp32 numbers ``i`` of those whose bits begin at ``first``: integers, or bytes, the low one first."""
    if field.dtype.element_ty == tl.int32:
        bits = tl.load(field + first + i, mask=here, other=0)
    else:
        byte = field + first + 4 * i
        bits = tl.load(byte, mask=here, other=0).to(tl.int32)
        bits |= tl.load(byte + 1, mask=here, other=0).to(tl.int32) << 8
        bits |= tl.load(byte + 2, mask=here, other=0).to(tl.int32) << 16
        bits |= tl.load(byte + 3, mask=here, other=0).to(tl.int32) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _number16(field, first, i, here):
    """The same of bfloat16, as fp32."""
    if field.dtype.element_ty == tl.int16:
        bits = tl.load(field + first + i, mask=here, other=0).to(tl.int32) << 16
    else:
        byte = field + first + 2 * i
        bits = tl.load(byte, mask=here, other=0).to(tl.int32) << 16
        bits |= tl.load(byte + 1, mask=here, other=0).to(tl.int32) << 24
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store32(field, first, i, bits, here):
    """Where `_number32` reads."""
    if field.dtype.element_ty == tl.int32:
        tl.store(field + first + i, bits, mask=here)
    else:
        for byte in tl.static_range(4):
            tl.store(field + first + 4 * i + byte, (bits >> (8 * byte)).to(tl.uint8), mask=here)


@triton.jit
def store16(field, first, i, bits, here):
    """Where `_number16` reads."""
    if field.dtype.element_ty == tl.int16:
        tl.store(field + first + i, bits.to(tl.int16), mask=here)
    else:
        for byte in tl.static_range(2):
            tl.store(field + first + 2 * i + byte, (bits >> (8 * byte)).to(tl.uint8), mask=here)


@triton.jit
def _e4m3(codes, FP8: tl.constexpr):
    """fp32 numbers of e4m3 codes: by the chip, if FP8; else as float16, where the bits of a code one byte higher are
    its value / 256."""
    if FP8:
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        half = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & ~0x4000  # the sign had been extended over bit 14
        # Only code 0x7F is all ones below its sign: one more carries into bit 14, and that bit makes it a NaN.
        half |= ((half & 0x3F80) + 0x80) & 0x4000
        numbers = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return numbers
