"""Sample inputs of attention over the paged latent cache, and keys that a query can point at exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS
from glm5_hal.ops._common import batches
from glm5_hal.ops._common.batches import Batch
from glm5_hal.ops._common.caches import E4M3_NAN, grouped
from glm5_hal.spec import Draw, Sample

#: The best two scores of a pointing query differ by at least twice this: exp() of minus that is zero in fp32, and the
#: scores stay small enough for exp2(score · log2 e − max · log2 e) to be 1 at the best one, after rounding to bfloat16.
GAP = 64.0

#: What `below_zero` subtracts from every score: exp() of it is zero in fp32.
BELOW = 120.0


@dataclass(frozen=True)
class Latents:
    """A filled cache and the arguments that come with it: lengths, block table, format, scale."""

    batch: Batch
    args: Mapping[str, Any]
    poison: Mapping[str, Tensor]


def latents(sample: Sample, dtype: str, draw: Draw) -> Latents:
    """From the axes ``lens``, ``page``, ``format``, ``L``, ``R``, ``scale``; ``spare`` pages are nobody's.

    Latents are `values`; those of a quantised format differ in size from group to group, or are `every_code` where the
    sample says "pointer" or "codes". Where it says "pointer", rope keys are `pointed_keys`; where it says "below_zero",
    their last dim is 1. Where it says "broken", the first request's first key has a NaN among its rope dims, the last
    request's last key one in its latent.
    """
    axes = sample.axes
    L, R, fmt = axes["L"], axes["R"], FORMATS[axes["format"]]
    batch = batches.paged(draw, axes["lens"], axes["page"], axes.get("spare", 3))
    lengths = [s for _, s in batch.lens]
    keys = sum(lengths)
    latent = values(sample, dtype, draw, lengths, L)
    if fmt.group and (axes.get("pointer") or axes.get("codes")):
        latent = every_code(draw, keys, L, fmt.group, dtype)
    elif fmt.group:
        sizes = 2.0 ** draw.integers(-3, 1, keys, L // fmt.group)
        latent = (grouped(latent, fmt.group) * sizes.to(latent.dtype)[..., None]).flatten(-2)
    rope = draw.normal(keys, R, dtype=dtype)
    if axes.get("pointer"):
        rope = pointed_keys(lengths, R).to(rope.dtype)
    if axes.get("below_zero"):
        rope[:, -1] = 1.0
    if axes.get("broken"):
        rope[0, R // 2], latent[-1, L // 2] = torch.nan, torch.nan
    held, unread = batches.filled(fmt, batch, latent, rope)
    args = {
        "block_table": batch.block_table,
        "seq_lens": batch.seq_lens,
        "cu_seqlens_q": batch.cu_seqlens_q,
        "scale": axes["scale"],
        "kv_lora_rank": L,
        "cache_format": fmt.name,
        **batches.as_args(fmt, held),
    }
    return Latents(batch, args, {"block_table": batch.unused_table, **dict(zip(fmt.tensors, unread, strict=True))})


def values(sample: Sample, dtype: str, draw: Draw, lengths: Sequence[int], *shape: int) -> Tensor:
    """Values to average, of requests of these lengths, [Σ lengths, *shape].

    Integers where the fill is exact. If one of them alone is the result, none is zero (what the others leave of
    themselves in float64 would decide the sign of that zero). Else they are large and of one sign in every request's
    first half; in its second half the odd columns take back what they summed to, so that an accumulator of the storage
    dtype, which has lost digits by then, shows. Where the sample says "cancelling", all columns do that, of requests of
    512 keys or none: what is left is so large, and of so few digits, that sums which are off by rounding in fp32, as
    after merging parts of any length, come to the same in bfloat16.
    """
    rows = sum(lengths)
    if sample.fill != "exact":
        drawn: Tensor = draw.normal(rows, *shape, dtype=dtype)
        return drawn
    if sample.axes.get("cancelling"):
        steps = [(torch.arange(n) < n // 3) + torch.where(torch.arange(n) < n // 2, 64, -64) for n in lengths]
        few: Tensor = draw.small(rows, *shape, dtype=dtype, bound=1)
        return few + torch.cat(steps).view(rows, *[1] * len(shape)).to(few.dtype)
    x: Tensor = draw.small(rows, *shape, dtype=dtype)
    if sample.axes.get("pointer"):
        return 2 * x + 1
    later = torch.cat([torch.arange(n) >= n // 2 for n in lengths]) if lengths else torch.zeros(0, dtype=torch.bool)
    back = later[:, None] & (torch.arange(shape[-1]) % 2 == 1)
    return x + torch.where(back, -64, 64).view(rows, *[1] * (len(shape) - 1), shape[-1]).to(x.dtype)


def every_code(draw: Draw, rows: int, width: int, group: int, dtype: str) -> Tensor:
    """Rows that e4m3 holds exactly at scale 1, the largest number in every group: of a few rows, between them, every
    code but those of zero (see `values`) and NaN, subnormal ones as often as normal ones."""
    codes = draw.integers(1, E4M3_NAN, rows, width)
    codes[:, ::group] = E4M3_NAN - 1
    signs = 128 * draw.integers(0, 2, rows, width)
    return (codes + signs).to(torch.uint8).view(torch.float8_e4m3fn).to(getattr(torch, dtype))


def pushed_down(q: Tensor, scale: float) -> Tensor:
    """The queries with every score `BELOW` lower, over keys whose last dim is 1: none is above zero."""
    q = q.clone()
    q[..., -1] = -BELOW / scale
    return q


def pointed_keys(lengths: list[int], width: int) -> Tensor:
    """Keys of requests of these lengths, at most 256 each: the position, then its binary digits as ±1."""
    rows = [torch.arange(n) for n in lengths]
    positions = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    return torch.cat([positions[:, None], _digits(positions, width - 1)], -1).float()


def pointing_queries(draw: Draw, visible: Tensor, heads: int, width: int) -> Tensor:
    """Queries [T, heads, width] that see ``visible[t]`` of `pointed_keys` and, at scale 1, attend to one of them alone:
    in turn the last visible one, the first one and any one. So a mask that is off by one key gives another value."""
    T = len(visible)
    chosen = draw.integers(0, 1 << 16, T, heads) % visible.clamp_min(1)[:, None]
    q = torch.cat([torch.zeros(T, heads, 1), _digits(chosen, width - 1)], -1)
    turn = (torch.arange(T)[:, None] + torch.arange(heads)) % 3
    last = torch.zeros(width)
    last[0] = 2.0
    q[turn == 0], q[turn == 1] = last, -last
    return GAP * q


def _digits(n: Tensor, width: int) -> Tensor:
    return 2.0 * (n[..., None] >> torch.arange(width) & 1) - 1.0
