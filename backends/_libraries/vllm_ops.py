"""Ops with vLLM's names and schemas, ``torch.ops._C``, which vendors register for their own device, as kernels of ours.

They write into what they are given: a norm's sum goes where the residual was, so those are copies. Rows have no gaps,
and begin where a vector may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.needs import ALIKE, FLOATS
from glm5_hal.backends._libraries.physical import aligned
from glm5_hal.capability import contiguous, dtype, one_of

#: What is looked for under ``torch.ops``.
OPS = ("_C.rms_norm", "_C.fused_add_rms_norm", "_C.silu_and_mul", "_C_cache_ops.concat_and_cache_mla")


def declared(provider: str) -> tuple[Kernel, Kernel, Kernel, Kernel]:
    """Kernels of rms_norm, add_rms_norm, silu_and_mul and mla_cache_write."""
    norm = (dtype("x", *FLOATS), ALIKE)
    latent = (dtype("kv_c", *FLOATS), one_of("cache_format", "latent_576"), contiguous("kv_cache"))
    return (
        Kernel("rms_norm", provider, _rms_norm, norm),
        Kernel("add_rms_norm", provider, _add_rms_norm, norm),
        Kernel("silu_and_mul", provider, _silu_and_mul, (dtype("x", *FLOATS), one_of("limit", None))),
        Kernel("mla_cache_write", provider, _mla_cache_write, latent, frozenset({"deterministic"})),
    )


def _ops() -> Any:
    return torch.ops._C


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        _ops().rms_norm(_rows(y), _rows(aligned(x)), aligned(weight), eps)
    return y


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    y, h = (t.clone(memory_format=torch.contiguous_format) for t in (x, residual))
    if x.numel():
        _ops().fused_add_rms_norm(_rows(y), _rows(h), aligned(weight), eps)
    return y, h


def _silu_and_mul(x: Tensor, *, limit: float | None = None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if x.numel():
        _ops().silu_and_mul(_rows(y), _rows(aligned(x)))
    return y


def _mla_cache_write(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    rope_cache: Tensor | None = None,
    *,
    cache_format: str = "latent_576",
) -> None:
    if kv_c.numel() and kv_cache.numel():
        unscaled = torch.ones(1, dtype=torch.float32, device=kv_c.device)
        given = (kv_c.contiguous(), k_pe.contiguous(), kv_cache, slot_mapping.contiguous())
        torch.ops._C_cache_ops.concat_and_cache_mla(*given, "auto", unscaled)


def _rows(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])
