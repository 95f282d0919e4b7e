"""sparse_mla by npu_sparse_flash_attention.

Its conventions, and what is done about them:

- it gives the softmax's maximum and sum (of scaled scores) over unpaged keys alone, and lse is one of our results. So
  keys are copied: the chosen ones, every token then being a request of its own, or all keys of every request, whichever
  are fewer. That also takes pages of any size, and both formats that are not quantised.
- it wants every row's valid indices first, and no more of them than there are keys.
- what a token gets that chose no key, or whose scores are all -inf, is not said: it is ours.

Legend: T tokens, H heads, L latent width, R rope dims, K indices per token, B requests, M pages per request, N pages,
P page size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.physical import requests_of
from glm5_hal.backends.ascend.indices import valid_first
from glm5_hal.backends.ascend.needs import A2, A3, A5, ABSORBED, HALVES, LATENT, UNQUANTISED, floats, has
from glm5_hal.backends.ascend.results import no_keys, ours
from glm5_hal.capability import arch, one_of, when

POSITIVE = when(
    lambda call: call.scalars["scale"] > 0,
    "the scale is positive: the vendor tests no other",
    "use a positive scale, or another kernel",
    reads=(("scale", "value"),),
)


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
        return no_keys(q, LATENT)
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
    return ours(out, (peak + total.log())[0], chosen[:, 0] < 0)


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
