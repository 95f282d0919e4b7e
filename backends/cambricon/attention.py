"""torch_mlu_ops' attention over a paged cache as kernels of ours. By its documentation each request's keys are its
pages up to a length, values are a key's first numbers, softmax is computed in fp32, lse is the natural logarithm, and
pages have a power of two of rows, one at least.

What it loads behind a request's last key is not said, so a key is a page: then there is nothing behind it in its page,
and what lies behind it in the table names a row that is read anyway. A token is a request.

Legend: T tokens, H heads, W = L+R absorbed width (latent, rope), K places per token.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.flash_mla import LATENT, WIDTH, no_keys, nothing, ours
from glm5_hal.backends._libraries.physical import aligned, compacted, everything, requests_of, rows, slots, whole_rows
from glm5_hal.capability import dtype, limit, one_of

#: Heads that it takes of one query.
HEADS = 128

COMMON = (
    dtype("q", "bfloat16", "float16"),
    one_of("cache_format", "latent_576"),
    one_of("kv_lora_rank", LATENT),
    one_of("W", WIDTH),
    limit("H", HEADS),
    whole_rows,
)


@kernel("sparse_mla", "tmo", requires=COMMON)
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
    if nothing(q, kv_cache, block_table, indices):
        return no_keys(q)
    keys, apart = rows(kv_cache)
    request = requests_of(cu_seqlens_q, len(q))
    return _attend(q, keys, *compacted(slots(indices, block_table, request, kv_cache.shape[1], apart, 1)), scale)


@kernel("mla_decode", "tmo", requires=COMMON)
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
    if nothing(q, kv_cache, block_table):
        return no_keys(q)
    keys, apart = rows(kv_cache)
    request = requests_of(cu_seqlens_q, len(q))
    places = everything(block_table, seq_lens, cu_seqlens_q, request, kv_cache.shape[1], apart)
    return _attend(q, keys, *places, scale)


def _attend(q: Tensor, keys: Tensor, table: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every token over the first ``seen [T]`` rows that ``table [T, K]`` names."""
    lengths = seen.clamp_min(1)  # of no key nothing is said: it has one, and what comes of it is written over
    out, lse = import_module("torch_mlu_ops").single_query_cached_kv_attn(
        aligned(q)[:, None], keys[:, None], None, None, table.contiguous(), lengths, None, None, None,
        table.shape[1], -1, -1, scale, True, head_size_v=LATENT,
    )  # fmt: skip
    out, lse = ours(out[:, 0], lse.reshape(lse.shape[0], -1), seen == 0)
    return out, torch.where(out[..., 0].isnan(), torch.nan, lse)
