"""Cache writes: slots, bytes, quantisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Quantiser
from glm5_hal.conformance.mutants.wrong.base import FP32, Fn, Wrong, bodied, wrapped


def floor_power(amax: Tensor, floor: str) -> Tensor:
    return honest.power_by_bits(amax, floor) / 2


def any_scale(amax: Tensor, floor: str) -> Tensor:
    return (amax.clamp_min(1e-4) / 448) if floor == "amax" else (amax / 448).clamp_min(1e-4)


def nearest_power(amax: Tensor, floor: str) -> Tensor:
    return torch.exp2(torch.round(torch.log2(any_scale(amax, floor))))


def truncated(x: Tensor) -> Tensor:
    codes = honest.to_e4m3(x)
    rounded = codes.view(torch.float8_e4m3fn).float()
    return torch.where((rounded.abs() > x.abs()) & (codes & 0x7F > 0), codes - 1, codes)


WRITES: dict[str, dict[str, Any]] = {
    "-1 written to the last slot": {"place": lambda slot: slot},
    "-1 written to slot 0": {"place": lambda slot: max(slot, 0)},
    "one slot too far": {"place": lambda slot: slot + 1 if slot >= 0 and slot % 8 < 7 else slot if slot >= 0 else None},
    "slots of 16 bits": {"place": lambda slot: slot & 0xFFFF if slot >= 0 else None},
    "slot 0 skipped": {"place": lambda slot: slot if slot > 0 else None},
}
QUANTISERS = {
    "scale no power of two": Quantiser(power=any_scale),
    "power of two below": Quantiser(power=floor_power),
    "nearest power of two": Quantiser(power=nearest_power),
    "codes truncated": Quantiser(codes=truncated),
    "NaN not kept apart": Quantiser(nonfinite=False),
    "1/8 smaller": Quantiser(divide=lambda x, s: x / s * 0.875),
}  # fmt: skip


class OtherFloor(Quantiser):
    def __call__(self, x: Tensor, group: int, floor: str) -> tuple[Tensor, Tensor]:
        return super().__call__(x, group, "scale" if floor == "amax" else "amax")


QUANTISERS["the other floor"] = OtherFloor()
QUANTISERS["no floor"] = Quantiser(
    power=lambda amax, floor: torch.exp2(torch.ceil(torch.log2(amax.clamp_min(1e-12) / 448)))
)


def the_caches() -> list[Wrong]:
    found = []
    for op in ("mla_cache_write", "index_cache_write"):
        found += [bodied(op, name, honest.write(**how)) for name, how in WRITES.items()]
        found += [
            bodied(op, name, honest.write(q), "accuracy" if q.nonfinite else ("accuracy", "nonfinite"), dtypes=("*",))
            for name, q in QUANTISERS.items()
        ]
    found += [
        bodied("mla_cache_write", "scale and rope swapped", honest.write(fields=lambda f: (f[0], *reversed(f[1:])))),
        bodied("mla_cache_write", "rope before the latent", honest.write(fields=lambda f: tuple(reversed(f)))),
        bodied("mla_cache_write", "rope in float16", honest.write(rope=lambda r: r.to(torch.float16).to(r.dtype)), dtypes=FP32),
        bodied("mla_cache_write", "rope de-interleaved", honest.write(rope=lambda r: torch.cat([r[:, 0::2], r[:, 1::2]], -1))),
        bodied("index_cache_write", "token by token", honest.write(block_major=False)),
        Wrong("index_cache_write", "in bfloat16", lambda: wrapped("index_cache_write", lambda ref, a: ref(**{**a, "k": a["k"].bfloat16().to(a["k"].dtype)})), dtypes=FP32),
        Wrong("mla_cache_write", "skipped rows read", _reads_skipped("mla_cache_write", "kv_c"), "poison"),
    ]  # fmt: skip
    return found


def _reads_skipped(op: str, name: str) -> Callable[[], Fn]:
    def run(reference: Fn, a: dict[str, Any]) -> Any:
        noise = (a[name].float().sum() * 0).to(a[name].dtype)
        return reference(**{**a, name: a[name] + noise})

    return lambda: wrapped(op, run)
