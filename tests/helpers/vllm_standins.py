"""Ops with vLLM's names, registered for CPU tensors under their real schemas: what vendors register for a device of
theirs. Roundings as in vLLM's kernels; what they refuse as in the vendors' host code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SCHEMAS = {
    "_C": (
        "rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()",
        "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()",
        "silu_and_mul(Tensor! result, Tensor input) -> ()",
    ),
    "_C_cache_ops": (
        "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor! kv_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "Tensor scale) -> ()",
    ),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def registered() -> Iterator[None]:
    """For a fixture: the ops are there while it lasts."""
    libraries = []
    for name, schemas in SCHEMAS.items():
        library = torch.library.Library(name, "FRAGMENT")
        for schema in schemas:
            library.define(schema)
            op = schema.partition("(")[0]
            library.impl(op, globals()[op], "CPU")
        libraries.append(library)
    try:
        yield
    finally:
        for library in libraries:
            library._destroy()


def _sound(*tensors: Tensor) -> None:
    for t in tensors:
        assert t.is_contiguous()
        assert t.dtype in FLOATS
        assert t.data_ptr() % 16 == 0, "a vector is loaded from where it begins"
        assert t.numel() > 0


def rms_norm(result: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
    _sound(result, input, weight)
    assert input.dim() == 2
    assert result.shape == input.shape
    assert result.dtype == input.dtype == weight.dtype
    result.copy_(_normed(input.float(), weight, epsilon))


def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    _sound(input, residual, weight)
    assert input.dtype == residual.dtype == weight.dtype
    residual.copy_((input.float() + residual.float()).to(input.dtype))
    input.copy_(_normed(residual.float(), weight, epsilon))


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Rounded before it is multiplied by the weight, as vLLM does."""
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(weight.dtype) * weight


def silu_and_mul(result: Tensor, input: Tensor) -> None:
    _sound(result, input)
    gate, up = input.chunk(2, -1)
    assert result.shape == gate.shape
    result.copy_((gate.float() / (1.0 + torch.exp(-gate.float()))).to(input.dtype) * up)


def concat_and_cache_mla(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, kv_cache_dtype: str, scale: Tensor
) -> None:
    assert kv_cache_dtype == "auto"
    assert scale.dtype == torch.float32
    assert slot_mapping.dtype == torch.int64
    assert kv_cache.shape[2] == kv_c.shape[1] + k_pe.shape[1]
    assert kv_c.dtype == k_pe.dtype == kv_cache.dtype
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            kv_cache[slot // kv_cache.shape[1], slot % kv_cache.shape[1]] = torch.cat([kv_c[t], k_pe[t]])
