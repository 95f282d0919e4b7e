"""A stand-in for torch_mlu_ops, which is closed: signatures, shapes, types and maths of its documentation, in plain
torch. It says nothing of what the real one computes on an MLU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from adapters import put
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def torch_mlu_ops(patch: pytest.MonkeyPatch, version: str = "1.6.0") -> ModuleType:
    functions = (
        single_query_cached_kv_attn, fused_rms_norm, active, reshape_paged_cache, moe_sigmoid_topk, moe_softmax_topk,
        group_gemm,
    )  # fmt: skip
    return put(patch, "torch_mlu_ops", __version__=version, **{each.__name__: each for each in functions})


def single_query_cached_kv_attn(
    q: Tensor,
    k_cache: Tensor,
    v_cache: None,
    out: None,
    block_tables: Tensor,
    context_lens: Tensor,
    k_cache_quant_scale: None,
    v_cache_quant_scale: None,
    alibi_slopes: None,
    max_context_len: int,
    windows_size_left: int,
    windows_size_right: int,
    softmax_scale: float,
    return_lse: bool = False,
    kv_cache_quant_bit_size: int = -1,
    q_quant_scale: None = None,
    out_quant_scale: None = None,
    out_dtype: torch.dtype = torch.half,
    compute_dtype: torch.dtype = torch.float,
    head_size_v: int = -1,
    mask: None = None,
    cu_seq_q: None = None,
    max_seq_q: int = -1,
    sink: None = None,
) -> tuple[Tensor, Tensor]:
    (batch, seq_q, heads, width), (blocks, kv_heads, size, cache_dim) = q.shape, k_cache.shape
    assert (windows_size_left, windows_size_right, return_lse) == (-1, -1, True), "more than was asked of the stand-in"
    assert q.dtype == k_cache.dtype
    assert q.dtype in FLOATS
    assert (seq_q, kv_heads) == (1, 1)
    assert size in (1, 2, 4, 8, 16, 32, 64)
    assert cache_dim == max(width, head_size_v)
    assert seq_q * heads // kv_heads <= 128
    assert block_tables.dtype == context_lens.dtype == torch.int32
    assert block_tables.is_contiguous()
    assert block_tables.shape[0] == len(context_lens) == batch
    assert bool((context_lens > 0).all()), "what it does with a request of no keys is not said"
    assert max_context_len <= 0 or max_context_len >= int(context_lens.max())
    made, lse = q.new_empty(batch, seq_q, heads, head_size_v), q.new_empty(batch, heads, seq_q, dtype=torch.float32)
    for i, length in enumerate(context_lens.tolist()):
        # What it loads behind the last key is not said: here the whole of what the table names, with probability 0.
        at = torch.arange(block_tables.shape[1] * size)
        pages = block_tables[i][at // size].long()
        assert bool(((pages >= 0) & (pages < blocks)).all()), "an illegal access"
        keys = k_cache[pages, 0, at % size].float()
        scores = (q[i, 0].float() @ keys.T * softmax_scale).masked_fill(at >= length, -torch.inf)
        made[i, 0] = (scores.softmax(-1) @ keys[:, :head_size_v]).to(q.dtype)
        lse[i, :, 0] = scores.logsumexp(-1)
    return made, lse


def fused_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: None,
    bias: None,
    eps: float,
    store_output_before_norm: bool,
    quant_scale: None = None,
    out: None = None,
    dynamic_quant: bool = False,
    store_output_after_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    assert x.dtype in FLOATS
    assert gamma is not None
    assert gamma.dtype == x.dtype
    assert gamma.shape == x.shape[-1:]
    assert residual is None or (residual.dtype == x.dtype and residual.shape == x.shape)
    assert x.numel() > 0
    total = x.float() if residual is None else x.float() + residual.float()
    normed = (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * gamma.float()).to(x.dtype)
    return (normed, total.to(x.dtype)) if store_output_before_norm else normed


def active(
    input: Tensor,
    act_mode: str,
    is_gated: bool,
    active_coef: float = 1.0,
    high_precision: bool = False,
    gelu_approximate: str = "none",
) -> Tensor:
    assert (act_mode, is_gated) == ("silu", True)
    assert input.dtype in FLOATS
    assert input.numel() > 0
    assert high_precision, "the fastest algorithm of an activation is not exact"
    gate, up = input.float().chunk(2, -1)
    return (gate / (1 + torch.exp(-gate)) * up).to(input.dtype)


def reshape_paged_cache(
    k: Tensor, v: None, k_cache: Tensor, v_cache: None, slot_mapping: Tensor, direction: bool = False
) -> Tensor:
    (tokens, heads, width), (_, cache_heads, size, cache_width) = k.shape, k_cache.shape
    assert (heads, width) == (cache_heads, cache_width)
    assert k.dtype == k_cache.dtype
    assert k.dtype in FLOATS
    assert slot_mapping.dtype == torch.int32
    assert slot_mapping.shape == (tokens,)
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // size, :, slot % size] = k[i]
    return k_cache


def moe_sigmoid_topk(
    input: Tensor,
    topk: int,
    normalize: bool = False,
    num_expert_group: int = -1,
    topk_group: int = 0,
    mask: None = None,
    normed_by: str = "topk_logit",
    route_scale: float = 1.0,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert input.is_contiguous()
    scores = input.float().sigmoid()
    biased = scores if score_bias is None else scores + score_bias.float()
    if num_expert_group > 1:
        groups = biased.unflatten(-1, (num_expert_group, -1))
        best = groups.amax(-1) if score_bias is None else groups.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(topk_group, -1).indices, True)
        biased = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    return _weighed(scores, biased, topk, normalize, route_scale)


def moe_softmax_topk(
    input: Tensor,
    topk: int,
    normalize: bool = False,
    num_expert_group: int = -1,
    topk_group: int = 0,
    mask: None = None,
    normed_by: str = "topk_logit",
    route_scale: float = 1.0,
    reduce_weight: None = None,
    expert_id: None = None,
    score_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert input.is_contiguous()
    assert num_expert_group <= 1, "what is not eligible counts as 0"
    scores = input.float().softmax(-1)
    return _weighed(scores, scores if score_bias is None else scores + score_bias.float(), topk, normalize, route_scale)


def _weighed(scores: Tensor, biased: Tensor, k: int, normalize: bool, scale: float) -> tuple[Tensor, Tensor]:
    ids = biased.topk(k, -1).indices
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, ids.int()


def group_gemm(
    a: Tensor,
    b: Tensor,
    group_list: Tensor,
    expand_idx: None,
    c: None,
    alpha: None,
    beta: None,
    max_in_group_list: int,
) -> Tensor:
    assert a.dtype == b.dtype
    assert a.dtype in FLOATS
    assert a.shape[1] == b.shape[2]
    assert group_list.dtype == torch.int32
    assert group_list.shape == (len(b),)
    counts = group_list.tolist()
    assert sum(counts) == len(a), "every row is some expert's"
    assert max(counts) <= max_in_group_list
    parts = [(rows.float() @ b[e].float().T).to(a.dtype) for e, rows in enumerate(a.split(counts))]
    return torch.cat(parts)
