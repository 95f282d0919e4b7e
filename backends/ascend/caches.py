"""mla_cache_write and index_cache_write by npu_scatter_nd_update_, for the formats that are not quantised.

Its conventions, and what is done about them:

- an index must be that of a row, and which tokens are skipped is known on the device alone: a skipped token writes once
  more what another token writes. Where all are skipped, they write what the first row of the cache holds already.
- rows are named by page and place, so pages may lie apart.
- uint8 is no dtype of it, so there is no fp8 format here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends.ascend.needs import A2_A3, UNQUANTISED, floats, has
from glm5_hal.capability import one_of


@kernel(
    "mla_cache_write",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_scatter_nd_update_"),
        one_of("cache_format", *UNQUANTISED),
        *floats("kv_c", "kv_cache"),
    ),
    provides=("graph_safe",),
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
    if rope_cache is None:
        store(((kv_cache, torch.cat([kv_c, k_pe], -1)),), slot_mapping)
    else:
        store(((kv_cache, kv_c), (rope_cache, k_pe)), slot_mapping)


@kernel(
    "index_cache_write",
    "aclnn",
    requires=(A2_A3, *has("npu_scatter_nd_update_"), one_of("cache_format", "bf16_128"), *floats("k", "index_cache")),
    provides=("graph_safe",),
)
def index_cache_write(k: Tensor, index_cache: Tensor, slot_mapping: Tensor, *, cache_format: str = "bf16_128") -> None:
    store(((index_cache, k),), slot_mapping)


def store(parts: tuple[tuple[Tensor, Tensor], ...], slots: Tensor) -> None:
    """Into each cache [N, P, W], token t's row [T, W] at slot ``slots[t]``; -1 skips the token."""
    cache = parts[0][0]
    if slots.numel() == 0 or cache.shape[0] == 0:
        return
    wanted = slots >= 0
    tokens = torch.arange(len(slots), device=slots.device)
    instead = torch.where(wanted, tokens, len(slots)).amin().clamp_max(len(slots) - 1)  # the first that is stored
    source = torch.where(wanted, tokens, instead)
    at = slots.index_select(0, source)
    some, place = (at >= 0)[:, None], at.clamp_min(0)
    index = torch.stack([place // cache.shape[1], place % cache.shape[1]], -1)
    for held, rows in parts:
        update = torch.where(some, rows.index_select(0, source), held[0, 0])
        torch.ops.npu.npu_scatter_nd_update_(held, index, update)
