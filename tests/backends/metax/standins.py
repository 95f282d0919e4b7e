"""Stand-ins for libraries that need a MetaX GPU: their signatures, their conventions and what they refuse, in plain
torch. Written from the interface, the host code and the kernels of mcFlashMLA at c2dbf6e. They say nothing of what the
real ones compute on a GPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from adapters import attend, put
from torch import Tensor

#: Keys of the dense kernel's tile.
TILE = 32


def flash_mla(patch: pytest.MonkeyPatch, version: str = "1.0.1") -> ModuleType:
    """The module. ``schedules`` counts how often one was made."""
    schedules: list[Tensor] = []

    def get_mla_metadata(
        cache_seqlens: Tensor, num_q_tokens_per_head_k: int, num_heads_k: int
    ) -> tuple[Tensor, Tensor]:
        assert cache_seqlens.dtype == torch.int32
        assert cache_seqlens.is_contiguous()
        assert num_heads_k == 1
        schedules.append(cache_seqlens)
        tiles = torch.zeros(8, 8, dtype=torch.int32)
        tiles[0, 0] = num_q_tokens_per_head_k
        splits = torch.cat([cache_seqlens.new_zeros(1), cache_seqlens.cumsum(0)]).int()
        return tiles, splits

    def flash_mla_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        head_dim_v: int,
        tile_scheduler_metadata: Tensor,
        num_splits: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        is_fp8_kvcache: bool = False,
        indices: None = None,
        indices_all_valid_per_q: None = None,
        descale_q: None = None,
        descale_k: None = None,
        cp_world_size: int = 1,
        cp_rank: int = 0,
        cp_tot_seqlen_k: None = None,
    ) -> tuple[Tensor, Tensor]:
        (b, s_q, h_q, d), (_, page, h_k, width) = q.shape, k_cache.shape
        assert indices is None, "more than was asked of the stand-in"
        assert not is_fp8_kvcache, "flash mla with kvcache api not support fp8 now"
        assert q.dtype in (torch.bfloat16, torch.float16)
        assert k_cache.dtype == q.dtype, "query and key must have the same dtype"
        assert b > 0, "batch size must be postive"
        assert (s_q, h_k, d, width, head_dim_v) == (1, 1, 576, 576, 512)
        assert page & (page - 1) == 0
        assert q.stride(-1) == k_cache.stride(-1) == block_table.stride(-1) == 1
        assert block_table.dtype == cache_seqlens.dtype == torch.int32
        assert cache_seqlens.is_contiguous()
        assert cache_seqlens.shape == (b,)
        assert block_table.shape[0] == b
        assert int(tile_scheduler_metadata[0, 0]) == h_q, "a schedule of another number of heads"
        lengths = cache_seqlens.tolist()
        assert num_splits.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()], "a stale schedule"
        scale = d**-0.5 if softmax_scale is None else softmax_scale
        # What no tile writes is what was there.
        out, lse = q.new_full((b, s_q, h_q, 512), 7.0), q.new_full((b, h_q, s_q), 7.0, dtype=torch.float32)
        for t, length in enumerate(lengths):
            if length == 0:
                continue
            at = torch.arange(-(-length // TILE) * TILE)
            pages = block_table[t][at // page].long()  # a place beyond the row is an illegal access
            keys = k_cache[pages[:length], at[:length] % page, 0]
            out[t, 0], lse[t, :, 0] = attend(q[t, 0], keys, scale)
        return out, lse

    return put(
        patch, "flash_mla", get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=flash_mla_with_kvcache,
        flash_mla_interface=put(patch, "flash_mla.flash_mla_interface"), schedules=schedules, __version__=version,
    )  # fmt: skip
