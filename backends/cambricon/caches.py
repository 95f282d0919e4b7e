"""torch_mlu_ops' writes into a paged cache as kernels of ours: rows as they are, and a negative slot skips one. Its
caches have a head before the rows of a page; ours have one head, so the bytes are the same."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.needs import FLOATS
from glm5_hal.capability import contiguous, dtype, one_of


@kernel(
    "mla_cache_write",
    "tmo",
    requires=(dtype("kv_c", *FLOATS), one_of("cache_format", "latent_576"), contiguous("kv_cache")),
    provides=("deterministic",),
)
def mla_cache_write(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    rope_cache: Tensor | None = None,
    *,
    cache_format: str = "latent_576",
) -> None:
    _write(torch.cat([kv_c, k_pe], -1), kv_cache, slot_mapping)


@kernel(
    "index_cache_write",
    "tmo",
    requires=(dtype("k", *FLOATS), one_of("cache_format", "bf16_128"), contiguous("index_cache")),
    provides=("deterministic",),
)
def index_cache_write(k: Tensor, index_cache: Tensor, slot_mapping: Tensor, *, cache_format: str = "bf16_128") -> None:
    _write(k.contiguous(), index_cache, slot_mapping)


def _write(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    if rows.numel() and cache.numel():
        import_module("torch_mlu_ops").reshape_paged_cache(rows[:, None], None, cache[:, None], None, slots.int())
