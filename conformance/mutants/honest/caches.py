"""Cache writes, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_hal.conformance.mutants.honest.calls import Args, Body
from glm5_hal.conformance.mutants.honest.paging import held_of
from glm5_hal.formats import FORMATS


def power_by_log2(amax: Tensor, floor: str) -> Tensor:
    raw = (amax.clamp_min(1e-4) / 448) if floor == "amax" else (amax / 448).clamp_min(1e-4)
    return torch.exp2(torch.ceil(torch.log2(raw.double()))).float()


def power_by_bits(amax: Tensor, floor: str) -> Tensor:
    """The exponent's bits, up by one unless the mantissa is zero."""
    raw = (amax.clamp_min(1e-4) / 448) if floor == "amax" else (amax / 448).clamp_min(1e-4)
    bits = raw.view(torch.int32)
    return ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


@dataclass(frozen=True)
class Quantiser:
    """Rows to codes and scales; the defaults are right."""

    power: Callable[[Tensor, str], Tensor] = power_by_bits
    divide: Callable[[Tensor, Tensor], Tensor] = lambda x, s: x / s
    codes: Callable[[Tensor], Tensor] = to_e4m3
    nonfinite: bool = True

    def __call__(self, x: Tensor, group: int, floor: str) -> tuple[Tensor, Tensor]:
        groups = x.float().reshape(len(x), x.shape[1] // group, group)
        broken = ~groups.isfinite().all(-1) if self.nonfinite else torch.zeros(groups.shape[:-1], dtype=torch.bool)
        amax = groups.abs().amax(-1).masked_fill(broken, 0)
        scale = self.power(amax, floor).masked_fill(broken, 1)
        codes = self.codes(self.divide(groups, scale[..., None]).reshape(x.shape))
        wide = broken.repeat_interleave(group, 1)
        return codes.masked_fill(wide, 0x7F), scale


def write(
    quantise: Quantiser = Quantiser(),
    fields: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda fields: fields,
    block_major: bool | None = None,
    place: Callable[[int], int | None] = lambda slot: slot if slot >= 0 else None,
    rope: Callable[[Tensor], Tensor] = lambda rope: rope,
) -> Body:
    """mla_cache_write and index_cache_write, token by token."""

    def body(a: Args) -> None:
        index = hasattr(a, "index_cache")
        held = [a.index_cache] if index else held_of(a)
        latent, k_pe = (a.k, None) if index else (a.kv_c, rope(a.k_pe))
        fmt = FORMATS[a.cache_format]
        page = held[0].shape[1]
        if fmt.group:
            codes, scale = quantise(latent, fmt.group, fmt.floor)
            parts = {"latent": codes, "scale": scale.contiguous().view(torch.uint8)}
            if k_pe is not None:
                parts["rope"] = k_pe.to(torch.bfloat16).contiguous().view(torch.uint8)
        major = fmt.block_major if block_major is None else block_major
        for t, slot in enumerate(a.slot_mapping.tolist()):
            target = place(slot)
            if target is None:
                continue
            n, at = target // page, target % page
            if not fmt.group:
                rows = [latent[t]] if k_pe is None else [latent[t], k_pe[t]]
                for cache, row in zip(held, rows if len(rows) == len(held) else [torch.cat(rows)], strict=True):
                    cache[n, at] = row
            elif major:
                start, whole = 0, held[0][n].view(-1)
                for name in fields(fmt.fields):
                    width = parts[name].shape[-1]
                    whole[start + at * width : start + (at + 1) * width] = parts[name][t]
                    start += width * page
            else:
                held[0][n, at] = torch.cat([parts[name][t] for name in fields(fmt.fields)])

    return body
