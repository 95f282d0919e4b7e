"""mla_decode by npu_fused_infer_attention_score_v2, and mla_prefill for the heads that are documented.

Its conventions, and what is done about them:

- it takes lengths as lists, which come from the step's plan; pages as they are, with the rope keys in a tensor of their
  own; and for the causal mask a matrix of 2048 x 2048.
- it wants a cache of as many pages as its requests would have together: those that share pages are parted.
- what a query gets that sees no key, or whose scores are all -inf, is not said: it is ours.

Legend: T tokens, H heads, L latent width, B requests, N pages, P page size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.physical import requests_of, visible
from glm5_hal.backends.ascend.needs import A2_A3, ABSORBED, APART, HALVES, LATENT, PAGES, floats, has
from glm5_hal.backends.ascend.results import no_keys, ours
from glm5_hal.capability import contiguous, limit, one_of, when
from glm5_hal.plan import host_list, schedule
from glm5_hal.signature import Signature

#: Requests of one call, whose lengths are lists; and the size of a mask.
REQUESTS, MASK = 4096, 2048


@kernel(
    "mla_decode",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_fused_infer_attention_score_v2"),
        one_of("cache_format", *APART),
        *floats("q", "kv_cache", allowed=HALVES),
        *ABSORBED,
        PAGES,
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
        return no_keys(q, LATENT)
    ends, lengths = host_list(cu_seqlens_q), host_list(seq_lens)
    parts = [
        _decoded(q, kv_cache, block_table, rope_cache, ends[start : stop + 1], lengths[start:stop], start, scale)
        for start, stop in _shares(lengths, *kv_cache.shape[:2])
    ]
    out, lse = (torch.cat(results) if len(parts) > 1 else results[0] for results in zip(*parts, strict=True))
    if all(stop - start <= m for (start, stop), m in zip(pairwise(ends), lengths, strict=True)):
        return ours(out, lse)
    return ours(out, lse, visible(cu_seqlens_q, seq_lens, requests_of(cu_seqlens_q, len(q))) < 1)


def _shares(lengths: Sequence[int], pages: int, size: int) -> list[tuple[int, int]]:
    """Requests, first and past the last, whose pages are no more than the cache has: requests may share pages, and the
    op wants as many as if none did."""
    shares, start, taken = [], 0, 0
    for r, length in enumerate(lengths):
        own = -(-length // size)
        if taken + own > pages:
            shares.append((start, r))
            start, taken = r, 0
        taken += own
    return [*shares, (start, len(lengths))]


def _decoded(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    rope_cache: Tensor | None,
    ends: Sequence[int],
    lengths: Sequence[int],
    start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Of requests from ``start`` on, whose queries begin and end at ``ends``."""
    q = q[ends[0] : ends[-1]]
    queries = [stop - start for start, stop in pairwise(ends)]
    if len(q) == 0:
        return q.new_empty(0, q.shape[1], LATENT), q.new_empty(0, q.shape[1], dtype=torch.float32)
    out, lse = torch.ops.npu.npu_fused_infer_attention_score_v2(
        q[..., :LATENT].contiguous(),
        kv_cache,
        kv_cache,
        query_rope=q[..., LATENT:].contiguous(),
        key_rope=rope_cache,
        actual_seq_qlen=[end - ends[0] for end in ends[1:]],
        actual_seq_kvlen=list(lengths),
        block_table=block_table[start : start + len(lengths)].contiguous(),
        block_size=kv_cache.shape[1],
        num_query_heads=q.shape[1],
        num_key_value_heads=1,
        softmax_scale=scale,
        input_layout="TND",
        return_softmax_lse=True,
        **_mask(max(queries) > 1, q.device),
    )
    return out, lse[..., 0]


def _mask(wanted: bool, device: torch.device) -> dict[str, object]:
    """Causal, bottom-right aligned, from a matrix that says what is hidden; one query per request sees all keys."""
    if not wanted:
        return {"sparse_mode": 0}
    made = schedule(
        ("aclnn", "mask", device),
        lambda: torch.ones(MASK, MASK, dtype=torch.bool, device=device).triu_(1),
    )
    return {"sparse_mode": 3, "atten_mask": made}


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
        return no_keys(q, v.shape[-1])
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
        return ours(out, lse)
    keys, request = cu_seqlens_k.diff(), requests_of(cu_seqlens_q, len(q))
    seen = visible(cu_seqlens_q, keys, request) if causal else keys.index_select(0, request)
    return ours(out, lse, seen < 1)
