"""mcFlashMLA's dense kernel as kernels of ours, by its interface, host code and kernels at c2dbf6e.

It has kernels for sparse attention too, and they are not used: where an index is -1 they multiply a probability of 0
with row 0 of the cache, which nobody may have written, and they address rows with 32 bits. The dense kernel reads pages
of any power of two, and of one row as well: so a token's keys are its pages, those that are -1 left out. What it does:

- a row beyond the last key is not loaded, and the block table is read to the end of a tile of 32 keys.
- of a token without a key it writes nothing.
- lse is the natural logarithm, +inf where a sum is 0 or NaN.
- it takes bfloat16 and float16, and no fp8 cache on any chip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.flash_mla import LATENT, POSITIVE, TOKENS, WIDTH, Interface, no_keys, nothing
from glm5_hal.backends._libraries.physical import aligned, compacted, requests_of, rows, slots, whole_rows
from glm5_hal.capability import dtype, limit, one_of, when

#: Keys of a tile.
TILE = 32


def _schedule(library: Any, q: Tensor, seen: Tensor | None, topk: int | None) -> tuple[Any, Any]:
    """Of numbers of keys, by a kernel: nothing is read on the host."""
    metadata: tuple[Any, Any] = library.get_mla_metadata(seen, q.shape[2], 1)
    return metadata


FLASH_MLA = Interface("flash_mla", TILE, _schedule, ahead=TILE)

POWER_OF_TWO = when(
    lambda call: call.axes["P"] & (call.axes["P"] - 1) == 0,
    "it finds a key's page by a shift: only pages of a power of two",
    "allocate the cache with pages of 64, or use another kernel",
    reads=(("P", "value"),),
)

COMMON = (
    dtype("q", "bfloat16", "float16"),
    one_of("cache_format", "latent_576"),
    one_of("kv_lora_rank", LATENT),
    one_of("W", WIDTH),
    limit("H", 128),
    POSITIVE,
    whole_rows,
)


@kernel("sparse_mla", "flash_mla", requires=COMMON, provides=("deterministic", "graph_safe"))
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
    (keys, apart), q = rows(kv_cache), aligned(q)
    request = requests_of(cu_seqlens_q, len(q))
    table, count = compacted(slots(indices, block_table, request, kv_cache.shape[1], apart, TILE))
    parts = []
    for part, pages, seen in zip(*(torch.split(each, TOKENS) for each in (q, table, count)), strict=True):
        plan = _schedule(FLASH_MLA.library, part[:, None], seen, None)
        parts.append(FLASH_MLA.attend(part, keys, pages, seen, plan, scale))
    if len(parts) == 1:
        return parts[0]
    out, lse = (torch.cat(each) for each in zip(*parts, strict=True))
    return out, lse


@kernel(
    "mla_decode",
    "flash_mla",
    requires=(*COMMON, limit("T", TOKENS), POWER_OF_TWO),
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
