"""FlashMLA's kernels for Hopper and Blackwell as kernels of ours, by its interface, its tests' reference and its
kernels at 9241ae3. A schedule is filled at its first call, from shapes and numbers of keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.flash_mla import FEW, LATENT, POSITIVE, TOKENS, WIDTH, Interface
from glm5_hal.backends._libraries.physical import whole_rows
from glm5_hal.capability import arch, dtype, limit, one_of


def _schedule(library: Any, q: Tensor, seen: Tensor | None, topk: int | None) -> tuple[Any, None]:
    return library.get_mla_metadata()[0], None


FLASH_MLA = Interface("flash_mla", 128, _schedule)


@kernel(
    "sparse_mla",
    "flash_mla",
    requires=(
        arch("sm_90", "sm_100", "sm_103"),
        dtype("q", "bfloat16"),
        one_of("cache_format", "latent_576", "fp8_656"),
        one_of("kv_lora_rank", LATENT),
        one_of("W", WIDTH),
        one_of("H", 64, 128),
        POSITIVE,
        FEW,
        whole_rows,
    ),
    provides=("deterministic", "graph_safe"),
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
    return FLASH_MLA.sparse(
        q, kv_cache, indices, block_table, seq_lens, cu_seqlens_q, scale=scale, cache_format=cache_format
    )


@kernel(
    "mla_decode",
    "flash_mla",
    requires=(
        arch("sm_90"),
        dtype("q", "bfloat16"),
        one_of("cache_format", "latent_576"),
        one_of("kv_lora_rank", LATENT),
        one_of("W", WIDTH),
        one_of("P", 64),
        limit("H", 128),
        limit("T", TOKENS),
        POSITIVE,
        whole_rows,
    ),
    provides=("deterministic", "graph_safe"),
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
    return FLASH_MLA.dense(q, kv_cache, block_table, seq_lens, cu_seqlens_q, scale=scale)
