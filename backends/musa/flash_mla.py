"""MATE's sparse attention as a kernel of ours, by its interface, host code and kernels at 3f58cc3. Beside FlashMLA's
conventions:

- a block has 64 heads, and what fewer heads leave of it is written over: their number is a multiple.
- an absent key is loaded from behind the cache, which gives 0, by an address of 32 bits.
- over an fp8 cache the schedule is of shapes alone, and pages lie side by side.
- lse is +inf, and an output of several parts 0, where a score is NaN as well.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.flash_mla import FEW, LATENT, POSITIVE, WIDTH, Interface
from glm5_hal.backends._libraries.physical import whole_rows
from glm5_hal.capability import arch, dtype, one_of, when
from glm5_hal.signature import Signature


def _schedule(library: Any, q: Tensor, seen: Tensor | None, topk: int | None) -> tuple[Any, Any]:
    H = q.shape[2]
    metadata: tuple[Any, Any] = library.get_mla_metadata(None, H, 1, H, True, topk, q=q)
    return metadata


MATE = Interface("mate.flashmla", 64, _schedule)


def _side_by_side(call: Signature) -> bool:
    cache = call.tensors["kv_cache"]
    return call.scalars["cache_format"] != "fp8_656" or cache is None or cache.contiguous


def _near(call: Signature) -> bool:
    cache = call.tensors["kv_cache"]
    if cache is None:
        return True
    pages, size, width = cache.shape
    apart = size * width if cache.strides is None else cache.strides[0]
    return 2 * pages * apart < 2**31


SIDE_BY_SIDE = when(
    _side_by_side,
    "an fp8 cache's pages lie side by side",
    "allocate the cache in one piece, or use another kernel",
    reads=(("cache_format", "value"), ("kv_cache", "strides"), ("kv_cache", "shape")),
)

NEAR = when(
    _near,
    "twice the cache's elements are fewer than 2^31: an absent key's address has 32 bits",
    "allocate fewer pages, or use another kernel",
    reads=(("kv_cache", "strides"), ("kv_cache", "shape")),
)


@kernel(
    "sparse_mla",
    "mate",
    requires=(
        arch("mp_31"),
        dtype("q", "bfloat16"),
        one_of("cache_format", "latent_576", "fp8_656"),
        one_of("kv_lora_rank", LATENT),
        one_of("W", WIDTH),
        one_of("H", 64, 128),
        POSITIVE,
        FEW,
        whole_rows,
        SIDE_BY_SIDE,
        NEAR,
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
    return MATE.sparse(
        q, kv_cache, indices, block_table, seq_lens, cu_seqlens_q, scale=scale, cache_format=cache_format
    )
