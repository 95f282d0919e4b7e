"""Attention over the latent cache by npu_sparse_flash_attention and npu_fused_infer_attention_score_v2, and with full
heads by the latter.

Their conventions, and what is done about them:

- npu_sparse_flash_attention gives the softmax's maximum and sum (of scaled scores) over unpaged keys alone, and lse is
  one of our results. So keys are copied: the chosen ones, every token then being a request of its own, or all keys of
  every request, whichever are fewer. That also takes pages of any size, and both formats that are not quantised.
- it wants every row's valid indices first, and says nothing of rows without any: their results are ours.
- npu_fused_infer_attention_score_v2 takes lengths as lists, which come from the step's plan; pages as they are, with
  the rope keys in a tensor of their own; and for the causal mask a matrix of 2048 x 2048.
- a query that sees no key gives what it likes; its result is ours.

Legend: T tokens, H heads, L latent width, R rope dims, K indices per token, B requests, M pages per request.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.physical import requests_of, visible
from glm5_hal.backends.ascend.indices import valid_first
from glm5_hal.backends.ascend.needs import (
    A2,
    A2_A3,
    A3,
    A5,
    ABSORBED,
    APART,
    HALVES,
    LATENT,
    UNQUANTISED,
    floats,
    has,
    pages,
)
from glm5_hal.capability import arch, contiguous, limit, one_of, when
from glm5_hal.plan import host_list, schedule
from glm5_hal.signature import Signature

POSITIVE = when(
    lambda call: call.scalars["scale"] > 0,
    "the scale is positive: the vendor tests no other",
    "use a positive scale, or another kernel",
    reads=(("scale", "value"),),
)

#: Requests of one call whose lengths are lists.
REQUESTS = 4096

MASK = 2048


@kernel(
    "sparse_mla",
    "aclnn",
    requires=(
        arch(A2, A3, A5),
        *has("npu_sparse_flash_attention"),
        one_of("cache_format", *UNQUANTISED),
        *floats("q", "kv_cache", allowed=HALVES),
        *ABSORBED,
        POSITIVE,
    ),
    provides=("graph_safe",),
)
def sparse_mla(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    rope_cache: Tensor | None = None,
    *,
    scale: float,
    kv_lora_rank: int,
    cache_format: str = "latent_576",
) -> tuple[Tensor, Tensor]:
    if any(t.numel() == 0 for t in (q, kv_cache, block_table, indices)):
        return _no_keys(q, LATENT)
    if indices.numel() < block_table.numel() * kv_cache.shape[1]:
        take, ends_q, ends_k, chosen = _chosen_keys(indices, block_table, cu_seqlens_q, kv_cache.shape[1])
    else:
        take, ends_q, ends_k, chosen = _all_keys(indices, block_table, cu_seqlens_q, kv_cache.shape)
    rows = take(kv_cache)
    latent = rows[:, None, :LATENT].contiguous()
    rope = (rows[:, LATENT:] if rope_cache is None else take(rope_cache))[:, None].contiguous()
    out, peak, total = torch.ops.npu.npu_sparse_flash_attention(
        q[..., :LATENT].contiguous(),
        latent,
        latent,
        chosen[:, None],
        scale,
        actual_seq_lengths_query=ends_q,
        actual_seq_lengths_kv=ends_k,
        query_rope=q[..., LATENT:].contiguous(),
        key_rope=rope,
        sparse_block_size=1,
        layout_query="TND",
        layout_kv="TND",
        sparse_mode=0,  # what was chosen is seen
        attention_mode=2,  # absorbed
        return_softmax_lse=True,
    )
    lse = (peak + total.log())[0]
    return _unless(chosen[:, 0] < 0, out, lse)


#: What copies the keys' rows [n, W] out of a cache; where each request's queries and keys end; indices [T, K].
Keys = tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]


def _chosen_keys(indices: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, page: int) -> Keys:
    """Every token a request of its own, with K keys: those that it chose, and others in place of -1."""
    T, K = indices.shape
    valid, local = indices >= 0, indices.clamp_min(0)
    held = block_table[requests_of(cu_seqlens_q, T)[:, None], (local // page).long()]
    at = torch.where(valid, held, 0).reshape(-1).long(), (local % page).reshape(-1).long()
    ends = torch.arange(1, T + 1, dtype=torch.int32, device=indices.device)
    own = torch.arange(K, dtype=torch.int32, device=indices.device).where(valid, -1)
    return lambda cache: cache[at], ends, ends * K, valid_first(own)


def _all_keys(indices: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, cache: torch.Size) -> Keys:
    """Every request with as many keys as its row of the block table has room for; those that are not its own are never
    chosen."""
    (B, M), (N, P, _) = block_table.shape, cache
    pages, room = block_table.clamp(0, N - 1).reshape(-1), M * P
    ends = torch.arange(1, B + 1, dtype=torch.int32, device=indices.device) * room
    return (
        lambda cache: cache.index_select(0, pages).flatten(0, 1),
        cu_seqlens_q[1:].contiguous(),
        ends,
        valid_first(indices)[:, :room].contiguous(),  # it wants no more of them than there are keys
    )


@kernel(
    "mla_decode",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_fused_infer_attention_score_v2"),
        one_of("cache_format", *APART),
        *floats("q", "kv_cache", allowed=HALVES),
        *ABSORBED,
        pages(),
        limit("B", REQUESTS),
        contiguous("kv_cache"),
        contiguous("rope_cache"),
    ),
)
def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    rope_cache: Tensor | None = None,
    *,
    scale: float,
    kv_lora_rank: int,
    cache_format: str = "latent_576",
) -> tuple[Tensor, Tensor]:
    if any(t.numel() == 0 for t in (q, kv_cache, block_table)):
        return _no_keys(q, LATENT)
    ends, lengths = host_list(cu_seqlens_q), host_list(seq_lens)
    queries = [stop - start for start, stop in pairwise(ends)]
    out, lse = torch.ops.npu.npu_fused_infer_attention_score_v2(
        q[..., :LATENT].contiguous(),
        kv_cache,
        kv_cache,
        query_rope=q[..., LATENT:].contiguous(),
        key_rope=rope_cache,
        actual_seq_qlen=list(ends[1:]),
        actual_seq_kvlen=list(lengths),
        block_table=block_table.contiguous(),
        block_size=kv_cache.shape[1],
        num_query_heads=q.shape[1],
        num_key_value_heads=1,
        softmax_scale=scale,
        input_layout="TND",
        return_softmax_lse=True,
        **_mask(max(queries) > 1, q.device),
    )
    lse = lse[..., 0]
    if all(n <= m for n, m in zip(queries, lengths, strict=True)):
        return out, lse
    return _unless(visible(cu_seqlens_q, seq_lens, requests_of(cu_seqlens_q, len(q))) < 1, out, lse)


def _mask(wanted: bool, device: torch.device) -> dict[str, object]:
    """Causal, bottom-right aligned, from a matrix that says what is hidden; one query per request sees all keys."""
    if not wanted:
        return {"sparse_mode": 0}
    made = schedule(
        ("aclnn", "mask", device),
        lambda: torch.ones(MASK, MASK, dtype=torch.bool, device=device).triu_(1),
    )
    return {"sparse_mode": 3, "atten_mask": made}


def _unless(blind: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The results, but for tokens [T] that see no key."""
    return out.masked_fill_(blind[:, None, None], 0.0), lse.masked_fill(blind[:, None], -torch.inf)


def _no_keys(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    return q.new_zeros(T, H, width), q.new_full((T, H), -torch.inf, dtype=torch.float32)


def _documented(call: Signature) -> bool:
    return (call.axes["Dqk"], call.axes["Dv"]) in ((64, 64), (128, 128), (192, 128))


@kernel(
    "mla_prefill",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_fused_infer_attention_score_v2"),
        *floats("q", allowed=HALVES),
        limit("H", 256),
        limit("B1", REQUESTS + 1),
        when(
            _documented,
            "heads of 192 for queries and 128 for values, or of 128 or of 64 for both; GLM-5 has 256 and 256",
            "use provider triton or torch for GLM-5's prefill, or its absorbed form: mla_decode or sparse_mla",
            reads=(("Dqk", "value"), ("Dv", "value")),
        ),
    ),
)
def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return _no_keys(q, v.shape[-1])
    ends_q, ends_k = host_list(cu_seqlens_q), host_list(cu_seqlens_k)
    out, lse = torch.ops.npu.npu_fused_infer_attention_score_v2(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        actual_seq_qlen=list(ends_q[1:]),
        actual_seq_kvlen=list(ends_k[1:]),
        num_query_heads=q.shape[1],
        num_key_value_heads=q.shape[1],
        softmax_scale=scale,
        input_layout="TND",
        return_softmax_lse=True,
        **_mask(causal, q.device),
    )
    lse = lse[..., 0]
    lengths = [(b - a, d - c) for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True)]
    if all(n <= m if causal else n == 0 or m > 0 for n, m in lengths):
        return out, lse
    keys, request = cu_seqlens_k.diff(), requests_of(cu_seqlens_q, len(q))
    seen = visible(cu_seqlens_q, keys, request) if causal else keys.index_select(0, request)
    return _unless(seen < 1, out, lse)
