"""The sparse kernel of Hygon's flash_mla as a kernel of ours. It is closed; that it keeps FlashMLA's interface and
conventions is what its callers rely on: they give it a latent cache in bfloat16 as rows, overwrite what it says of
tokens without a key, and merge its lse across devices as a natural logarithm."""

from __future__ import annotations

from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.flash_mla import LATENT, POSITIVE, WIDTH, Interface
from glm5_hal.backends._libraries.physical import whole_rows
from glm5_hal.capability import arch, dtype, one_of

FLASH_MLA = Interface("flash_mla", 128)


@kernel(
    "sparse_mla",
    "flash_mla",
    requires=(
        arch("gfx936", "gfx938"),
        dtype("q", "bfloat16"),
        one_of("cache_format", "latent_576"),
        one_of("kv_lora_rank", LATENT),
        one_of("W", WIDTH),
        one_of("H", 64, 128),
        POSITIVE,
        whole_rows,
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
    return FLASH_MLA.sparse(
        q, kv_cache, indices, block_table, seq_lens, cu_seqlens_q, scale=scale, cache_format=cache_format
    )
