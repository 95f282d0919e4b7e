"""The bytes of the named cache formats, read and written from their description in ``hal/formats.json``.

Quantisation: e4m3 with one fp32 scale per group; the scale is the power of two at or above amax/448 (spec sections
4.5 and 6.1), so every reader that converts scales to bf16 or E8M0 agrees on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import CacheFormat
from glm5_hal.ops._common.precision import exact, is_exact, up

E4M3_MAX = 448.0
E4M3_NAN = 0x7F
FLOOR = 1e-4


def power_of_two_scale(amax: Tensor, floor: str) -> Tensor:
    """The smallest power of two s with amax/s <= 448, fp32; ``floor``: whether 1e-4 bounds "amax" or the "scale"."""
    amax = amax.float()
    raw = (amax.clamp_min(FLOOR) / E4M3_MAX) if floor == "amax" else (amax / E4M3_MAX).clamp_min(FLOOR)
    mantissa, exponent = torch.frexp(raw)  # raw = mantissa * 2**exponent, mantissa in [0.5, 1): exact, unlike log2
    return torch.ldexp(torch.ones_like(raw), exponent - (mantissa == 0.5).int())


def quantise(x: Tensor, fmt: CacheFormat) -> tuple[Tensor, Tensor]:
    """``x [..., L]`` to e4m3 bytes ``[..., L]`` and fp32 scales ``[..., L/group]``. Saturates, never NaN from overflow.

    A group that holds a NaN or an infinity reads back as NaN, all of it: codes 0x7F, scale 1. The damage then shows
    wherever the row is used, instead of turning into a plausible number.
    """
    groups = grouped(x.float(), fmt.group)
    broken = ~groups.isfinite().all(-1)
    scale = power_of_two_scale(groups.abs().amax(-1).masked_fill(broken, 0.0), fmt.floor).masked_fill(broken, 1.0)
    codes = (groups / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.masked_fill(broken[..., None], E4M3_NAN).flatten(-2), scale


def dequantise(codes: Tensor, scale: Tensor, fmt: CacheFormat) -> Tensor:
    """e4m3 bytes and scales back to numbers: fp32, or float64 in an exact run."""
    values = codes.contiguous().view(torch.float8_e4m3fn).float()
    groups = grouped(values.double() if is_exact() else values, fmt.group)
    return (groups * scale[..., None]).flatten(-2)


def grouped(x: Tensor, group: int) -> Tensor:
    """``[..., L]`` as ``[..., L/group, group]``."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def held(kv_cache: Tensor, rope_cache: Tensor | None) -> tuple[Tensor, ...]:
    """A latent format's tensors, from the arguments of an op."""
    return (kv_cache,) if rope_cache is None else (kv_cache, rope_cache)


def field_widths(fmt: CacheFormat, width: int, latent: int) -> dict[str, int]:
    """Bytes of each part of a quantised row of ``width``, in the order in which the parts lie."""
    widths = {"latent": latent, "scale": 4 * (latent // fmt.group)}
    widths["rope"] = width - sum(widths.values())
    return {name: widths[name] for name in fmt.fields}


def fields(fmt: CacheFormat, caches: tuple[Tensor, ...], latent: int) -> dict[str, Tensor]:
    """Views ``[N, P, w]`` of what a row is made of: the format's tensors, or the parts of a quantised row."""
    if not fmt.group:
        return dict(zip(fmt.tensors, caches, strict=True))
    (cache,) = caches
    (N, P, width), views, start = cache.shape, {}, 0
    for name, w in field_widths(fmt, width, latent).items():
        if fmt.block_major:
            views[name] = cache.view(N, P * width)[:, start : start + P * w].view(N, P, w)
            start += P * w
        else:
            views[name] = cache[..., start : start + w]
            start += w
    return views


def write(fmt: CacheFormat, caches: tuple[Tensor, ...], slots: Tensor, latent: Tensor, rope: Tensor | None) -> None:
    """Store rows ``latent [n, L]`` (and ``rope [n, R]``) at flat ``slots [n]``, all valid."""
    page = caches[0].shape[1]
    block, offset = slots // page, slots % page
    if not fmt.group:
        parts = [latent] if rope is None else [latent, rope]
        rows = parts if len(caches) == len(parts) else [torch.cat(parts, -1)]
        for cache, row in zip(caches, rows, strict=True):
            cache[block, offset] = row.to(cache.dtype)
        return
    codes, scale = quantise(latent, fmt)
    quantised = {"latent": codes, "scale": _bytes(scale)}
    if rope is not None:
        quantised["rope"] = _bytes(rope.to(torch.bfloat16))
    for name, view in fields(fmt, caches, latent.shape[-1]).items():
        view[block, offset] = quantised[name]


def read(fmt: CacheFormat, caches: tuple[Tensor, ...], slots: Tensor, latent_dim: int) -> tuple[Tensor, Tensor | None]:
    """The rows at flat ``slots [n]`` as numbers: ``latent [n, L]`` and ``rope [n, R]`` (None for index keys),
    in the accumulation dtype."""
    page = caches[0].shape[1]
    block, offset = slots // page, slots % page
    if not fmt.group:
        rows = torch.cat([up(c[block, offset]) for c in caches], -1)
        return rows[:, :latent_dim], rows[:, latent_dim:] if fmt.kind == "latent" else None
    parts = {name: view[block, offset] for name, view in fields(fmt, caches, latent_dim).items()}
    latent = dequantise(parts["latent"], _numbers(parts["scale"], torch.float32), fmt)
    return latent, up(_numbers(parts["rope"], torch.bfloat16)) if "rope" in parts else None


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.contiguous().view(dtype)


# --- for tests: what a write touched, and what it left there ---------------------------------------------------------


def latent_dim(fmt: CacheFormat, args: Mapping[str, Any]) -> int:
    """Width of the latent (or index key) in a cache, from the cache's own width and the known rope width."""
    width: int = args[fmt.tensors[0]].shape[-1]
    if len(fmt.tensors) == 2 or (fmt.kind == "index" and not fmt.group):
        return width
    rope = 0 if fmt.kind == "index" else _rope_dim(args)
    if not fmt.group:
        return width - rope
    return (width - 2 * rope) * fmt.group // (fmt.group + 4)


def _rope_dim(args: Mapping[str, Any]) -> int:
    return int(args["k_pe"].shape[-1]) if "k_pe" in args else 2 * int(args["cos"].shape[-1])


def written(fmt: CacheFormat, args: Mapping[str, Any], slots: Tensor, tensor: str) -> Tensor:
    """Which elements of one of the format's tensors a write to these slots touches."""
    L = latent_dim(fmt, args)
    latent = torch.ones(len(slots), L)
    rope = torch.ones(len(slots), _rope_dim(args)) if fmt.kind == "latent" else None
    fillings = []
    for value in (0, 1):
        held = tuple(torch.full_like(args[t], value) for t in fmt.tensors)
        write(fmt, held, slots, latent * 3, None if rope is None else rope * 3)
        fillings.append(held[fmt.tensors.index(tensor)])
    return fillings[0] == fillings[1]


def read_exact(
    fmt: CacheFormat, held: tuple[Tensor, ...], slots: Tensor, latent_width: int
) -> tuple[Tensor, Tensor | None]:
    """`read` in float64."""
    with exact():
        return read(fmt, held, slots, latent_width)


def flip_floor(width: int) -> float:
    """What a few e4m3 codes that round the other way cost a row: two implementations that differ in the last bit
    before quantising differ by one code (1/8 of the value at most) in a few elements."""
    return 0.125 * math.sqrt(4.0 / width) / 2
