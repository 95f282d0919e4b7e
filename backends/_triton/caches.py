"""The two ops that write paged caches.

Legend: T tokens, n tokens of a program, L latent (or index key) width, R rope width, G groups of a row.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton import rows
from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.rows import store16, store32
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.formats import FORMATS, CacheFormat
from glm5_hal.ops._common import caches as bytes_of

CLAIMS = ("deterministic", "batch_invariant", "graph_safe")


@triton_kernel("mla_cache_write", provides=CLAIMS)
def mla_cache_write(
    tuning: Tuning,
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    rope_cache: Tensor | None = None,
    *,
    cache_format: str = "latent_576",
) -> None:
    held = bytes_of.held(kv_cache, rope_cache)
    _write(tuning, "mla_cache_write", FORMATS[cache_format], held, slot_mapping, kv_c, k_pe)


@triton_kernel("index_cache_write", provides=CLAIMS)
def index_cache_write(
    tuning: Tuning, k: Tensor, index_cache: Tensor, slot_mapping: Tensor, *, cache_format: str = "bf16_128"
) -> None:
    _write(tuning, "index_cache_write", FORMATS[cache_format], (index_cache,), slot_mapping, k, None)


def _write(
    tuning: Tuning,
    op: str,
    fmt: CacheFormat,
    caches: tuple[Tensor, ...],
    slots: Tensor,
    latent: Tensor,
    rope: Tensor | None,
) -> None:
    T, L = latent.shape
    given = latent if rope is None else rope  # a pointer that is not read
    R = 0 if rope is None else rope.shape[1]
    slots = slots if tuning.int64 else slots.int()
    launch(
        _write_rows, (triton.cdiv(T, tuning[op]["BLOCK_T"]),), latent,
        latent, *latent.stride(), given, *given.stride(), slots, slots.stride(0),
        *rows.fields(fmt, caches, L).args, T, PAGE=caches[0].shape[1],
        L=L, R=R, BLOCK_L=triton.next_power_of_2(L), BLOCK_R=triton.next_power_of_2(max(R, 1)),
        GROUP=fmt.group, LEAST=_least(fmt.floor), INDEX=addresses(tuning), **tuning[op],
    )  # fmt: skip


def _least(floor: str) -> int:
    """The exponent, as fp32 holds it, of the smallest scale: a power of two."""
    bound = {"scale": bytes_of.FLOOR, "amax": bytes_of.FLOOR / bytes_of.E4M3_MAX}
    return 127 + math.ceil(math.log2(bound[floor])) if floor else 0


@triton.jit
def _write_rows(
    latent, latent_token, latent_col, rope, rope_token, rope_col, slots, slots_token,
    latent_to, latent_page, latent_row, rope_to, rope_page, rope_row, scale_to, scale_page, scale_row, T,
    PAGE: tl.constexpr, L: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr, LEAST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(INDEX) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.load(slots + token * slots_token, mask=token < T, other=-1).to(INDEX)
    some = place >= 0
    page, slot = place // PAGE, place % PAGE

    col = tl.arange(0, BLOCK_L)
    here = some[:, None] & (col < L)[None, :]
    x = tl.load(latent + (token * latent_token)[:, None] + (col * latent_col)[None, :], mask=here, other=0.0)
    to = latent_to + (page * latent_page + slot * latent_row)[:, None] + col[None, :]
    if GROUP == 0:
        tl.store(to, x, mask=here)
    else:
        codes, scales = _quantised(x.to(tl.float32), BLOCK_T, BLOCK_L // GROUP, GROUP, LEAST)
        tl.store(to, codes.to(tl.uint8), mask=here)
        group = tl.arange(0, BLOCK_L // GROUP)
        first = (page * scale_page + slot * scale_row)[:, None]
        store32(scale_to, first, group[None, :], scales, some[:, None] & (group * GROUP < L)[None, :])

    if R > 0:
        col_R = tl.arange(0, BLOCK_R)
        here_R = some[:, None] & (col_R < R)[None, :]
        y = tl.load(rope + (token * rope_token)[:, None] + (col_R * rope_col)[None, :], mask=here_R, other=0.0)
        first_R = (page * rope_page + slot * rope_row)[:, None]
        if GROUP == 0:
            tl.store(rope_to + first_R + col_R[None, :], y, mask=here_R)
        else:
            store16(rope_to, first_R, col_R[None, :], _bfloat16(y.to(tl.float32)), here_R)


@triton.jit
def _quantised(x, n: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, LEAST: tl.constexpr):
    """fp32 ``x [n, G*GROUP]`` as e4m3 codes (int32), and the bits of the scales ``[n, G]``.

    All in integers: the largest magnitude of a group is that of its bits, a NaN's above all others, and a scale is the
    exponent that brings it to at most 448 = 1.75 * 2^8.
    """
    bits = tl.reshape(x.to(tl.int32, bitcast=True), (n, G, GROUP))
    top = tl.max(bits & 0x7FFFFFFF, 2)
    broken = top >= 0x7F800000
    exponent = tl.maximum((top >> 23) - 8 + ((top & 0x7FFFFF) > 0x600000).to(tl.int32), LEAST)
    exponent = tl.where(broken, 127, exponent)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    codes = _e4m3_codes(tl.reshape(x, (n, G, GROUP)) * inverse[:, :, None])
    codes = tl.where(broken[:, :, None], 0x7F, codes | ((bits >> 24) & 0x80))
    return tl.reshape(codes, (n, G * GROUP)), exponent << 23


@triton.jit
def _e4m3_codes(x):
    """The codes of the magnitudes of ``x``, which are 448 at most; to nearest, ties to even."""
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # The numbers from 2^14 on are 2^-9 apart, as e4m3's are below 2^-6: adding 2^14 rounds to one of them.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < ((127 - 6) << 23), small, normal)


@triton.jit
def _bfloat16(x):
    """The bits of bfloat16, to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded)
