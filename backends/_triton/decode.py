"""Attention over all keys of a request, in the absorbed form."""

from __future__ import annotations

from torch import Tensor

from glm5_hal.backends._triton.absorbed import attend
from glm5_hal.backends._triton.declare import triton_kernel
from glm5_hal.backends._triton.tuning import Tuning


@triton_kernel("mla_decode", provides=("deterministic", "graph_safe"))
def mla_decode(
    tuning: Tuning,
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
    return attend(
        tuning, "mla_decode", q, kv_cache, rope_cache, None, block_table, seq_lens, cu_seqlens_q,
        scale, kv_lora_rank, cache_format, invariant=False,
    )  # fmt: skip


@triton_kernel("mla_decode", provides=("deterministic", "batch_invariant", "graph_safe"), provider="triton-invariant")
def mla_decode_invariant(
    tuning: Tuning,
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
    return attend(
        tuning, "mla_decode", q, kv_cache, rope_cache, None, block_table, seq_lens, cu_seqlens_q,
        scale, kv_lora_rank, cache_format, invariant=True,
    )  # fmt: skip
