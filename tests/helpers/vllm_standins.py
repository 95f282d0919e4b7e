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
    "_moe_C": (
        "grouped_topk(Tensor scores, int n_group, int topk_group, int topk, bool renormalize, "
        "float routed_scaling_factor, Tensor bias, int scoring_func) -> (Tensor, Tensor)",
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


def grouped_topk(
    scores: Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: Tensor,
    scoring_func: int,
) -> tuple[Tensor, Tensor]:
    """Token by token, as its kernel does: what is not finite is no candidate, and what is not found is expert 0."""
    tokens, experts = scores.shape
    assert scores.is_contiguous()
    assert bias.is_contiguous()
    assert bias.shape == (experts,)
    assert scores.dtype == bias.dtype == torch.float32
    assert experts % n_group == 0
    assert n_group <= 32
    assert topk <= 32
    assert scoring_func in (0, 1)
    if scoring_func == 1:
        scores = 0.5 * torch.tanh(0.5 * scores) + 0.5
    weights, ids = torch.empty(tokens, topk), torch.zeros(tokens, topk, dtype=torch.int32)
    for t, (row, choice) in enumerate(zip(scores, scores + bias, strict=True)):
        groups = [_two_best(group) for group in choice.reshape(n_group, -1).tolist()]
        best = sorted((-value, g) for g, value in enumerate(groups) if abs(value) < torch.inf)[:topk_group]
        if not best:
            weights[t], ids[t] = 1.0 / topk, torch.arange(topk)
            continue
        size = experts // n_group
        eligible = sorted(e for _, g in best for e in range(g * size, (g + 1) * size) if choice[e].isfinite())
        chosen = sorted(eligible, key=lambda e: -float(choice[e]))[:topk]
        ids[t, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        picked = row[ids[t].long()]
        total = 1e-20 + float(picked.sum()) if renormalize else 1.0
        weights[t] = picked * (routed_scaling_factor / total)
    return weights, ids


def _two_best(group: list[float]) -> float:
    """Their sum. A NaN is larger than nothing, and of one expert there is no second."""
    first, second, *_ = [*sorted((c for c in group if c == c), reverse=True), -torch.inf, -torch.inf]
    return first + second
