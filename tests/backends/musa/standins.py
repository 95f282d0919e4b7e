"""Stand-ins for MATE, which needs a Moore Threads GPU: its signatures, its conventions and what it refuses, in plain
torch. Written from its interface, host code and kernels at 3f58cc3. They say nothing of what it computes on a GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from adapters import put
from torch import Tensor

#: What a score begins with where there is no key; a row that found no higher one has none.
MASKED, LOWEST = -(2.0**30), -(2.0**29)


def mate(patch: pytest.MonkeyPatch, version: str = "0.2.2") -> ModuleType:
    """The package. ``flashmla.schedules`` lists those that were made."""
    return put(
        patch, "mate", __version__=version, flashmla=put(patch, "mate.flashmla", **flashmla()),
        deep_gemm=put(patch, "mate.deep_gemm", m_grouped_bf16_gemm_nt_contiguous=m_grouped_bf16_gemm_nt_contiguous),
    )  # fmt: skip


def flashmla() -> dict[str, Any]:
    schedules: list[Tensor] = []

    def get_mla_metadata(
        cache_seqlens: Tensor | None,
        num_q_tokens_per_head_k: int,
        num_heads_k: int,
        num_heads_q: int | None = None,
        is_fp8_kvcache: bool = False,
        topk: int | None = None,
        extra_topk: None = None,
        q: Tensor | None = None,
        bs: int | None = None,
        topk_length: None = None,
        extra_topk_length: None = None,
    ) -> tuple[Tensor, Tensor]:
        assert topk is not None, "more than was asked of the stand-in"
        assert is_fp8_kvcache, "Sparse BF16 MLA is not supported on MP31"
        assert num_heads_q is not None, "num_heads_q must be provided when topk is provided"
        assert q is not None, "seqlens_k or q must be provided"
        assert num_heads_k == 1
        tiles = torch.zeros(4, 8, dtype=torch.int32)
        tiles[0, :3] = torch.tensor([len(q), num_q_tokens_per_head_k, topk])
        schedules.append(tiles)
        return tiles, torch.arange(len(q) + 1, dtype=torch.int32)

    def flash_mla_sparse_fwd(
        q: Tensor,
        kv: Tensor,
        indices: Tensor,
        sm_scale: float,
        d_v: int = 512,
        attn_sink: None = None,
        topk_length: None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert q.dtype == kv.dtype == torch.bfloat16
        assert indices.dtype == torch.int32
        assert q.is_contiguous()
        assert kv.is_contiguous()
        assert indices.is_contiguous()
        (s_q, h_q, d), (s_kv, h_kv, width), topk = q.shape, kv.shape, indices.shape[2]
        assert (h_kv, d, width, d_v) == (1, 576, 576, 512)
        assert h_q % 64 == 0, "what the block has more is written over"
        assert indices.shape == (s_q, 1, topk)
        assert topk % 64 == 0, "otherwise will load some index=0 thus causing wrong kv to be loaded"
        assert s_kv * 576 * 2 < 2**31, "an address of 32 bits"
        out, lse = q.new_empty(s_q, h_q, 512), q.new_empty(s_q, h_q, dtype=torch.float32)
        for t in range(s_q):
            out[t], lse[t] = _attend(q[t], *_found(kv[:, 0], indices[t, 0]), sm_scale)
        return out, lse, lse

    def flash_mla_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor | None,
        cache_seqlens: Tensor | None,
        head_dim_v: int,
        tile_scheduler_metadata: Tensor,
        num_splits: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        is_fp8_kvcache: bool = False,
        indices: Tensor | None = None,
        attn_sink: None = None,
        extra_k_cache: None = None,
        extra_indices_in_kvcache: None = None,
        topk_length: None = None,
        extra_topk_length: None = None,
    ) -> tuple[Tensor, Tensor]:
        assert indices is not None, "more than was asked of the stand-in"
        assert not causal, "causal must be `false` if sparse attention is enabled."
        assert is_fp8_kvcache, "sparse mla decode only support fp8 kvcache"
        assert softmax_scale is not None
        (b, s_q, h_q, d), topk = q.shape, indices.shape[2]
        assert (s_q, d, head_dim_v, k_cache.shape[2:]) == (1, 576, 512, (1, 656))
        assert h_q % 64 == 0
        assert q.dtype == torch.bfloat16
        assert k_cache.dtype == torch.uint8
        assert indices.dtype == torch.int32
        assert indices.shape == (b, s_q, topk)
        assert topk % 64 == 0
        assert q.is_contiguous()
        assert indices.is_contiguous()
        assert tile_scheduler_metadata[0, :3].tolist() == [b, h_q, topk], "a stale schedule"
        assert num_splits.shape == (b + 1,)
        rows = k_cache.view(-1, 656)  # of pages that lie side by side
        out, lse = q.new_empty(b, s_q, h_q, 512), q.new_empty(b, h_q, s_q, dtype=torch.float32)
        for t in range(b):
            keys, valid = _found(rows, indices[t, 0])
            out[t, 0], lse[t, :, 0] = _attend(q[t, 0], _dequantised(keys), valid, softmax_scale)
        return out.masked_fill(lse.transpose(1, 2)[..., None] == torch.inf, 0.0), lse  # as where parts are combined

    return {
        "get_mla_metadata": get_mla_metadata,
        "flash_mla_sparse_fwd": flash_mla_sparse_fwd,
        "flash_mla_with_kvcache": flash_mla_with_kvcache,
        "schedules": schedules,
    }


def _found(rows: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that are named, 0 for those that are not there."""
    valid = (named >= 0) & (named < len(rows))
    found = rows[named.masked_fill(~valid, 0).long()]
    return torch.where(valid[:, None], found, torch.zeros_like(found)), valid


def _attend(q: Tensor, keys: Tensor, valid: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = torch.where(valid, 0.0, MASKED) + q.float() @ keys.float().T
    peak = scores.nan_to_num(nan=MASKED, posinf=torch.inf, neginf=-torch.inf).amax(-1, keepdim=True).clamp_min(MASKED)
    p = ((scores - peak) * scale).exp()
    total, found = p.sum(-1, keepdim=True), peak > LOWEST
    out = (p.to(q.dtype).float() @ keys[:, :512].float()) * torch.where(found, 1.0 / total, 0.0)
    lse = torch.where(found & ~total.isnan(), total.log() + peak * scale, torch.inf)
    return out.to(q.dtype), lse[:, 0]


def _dequantised(rows: Tensor) -> Tensor:
    """[n, 656] bytes as numbers."""
    codes = rows[:, :512].contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (4, 128))
    scales = rows[:, 512:528].contiguous().view(torch.float32)
    rope = rows[:, 528:].contiguous().view(torch.bfloat16).float()
    return torch.cat([(codes * scales[..., None]).flatten(1), rope], 1).bfloat16()


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor, b: Tensor, d: Tensor, m_indices: Tensor, alignment_m: int = 128
) -> None:
    (m, k), (groups, n, _) = a.shape, b.shape
    assert alignment_m in (128, 256)
    assert a.dtype == b.dtype == d.dtype
    assert a.dtype in (torch.bfloat16, torch.float16)
    assert m_indices.dtype == torch.int32
    assert m_indices.is_contiguous()
    assert d.is_contiguous()
    assert a.stride(-1) == b.stride(-1) == 1
    assert (b.shape[2], d.shape, m_indices.shape) == (k, (m, n), (m,))
    assert m % alignment_m == 0
    d.fill_(torch.nan)  # what no block computes is not written
    for start in range(0, m, alignment_m):
        rows = slice(start, start + alignment_m)
        whose, expert = m_indices[rows], int(m_indices[start])
        assert expert < groups
        assert ((whose == expert) | (whose == -1)).all(), "a block of two experts"
        if expert >= 0:
            d[rows] = (a[rows].float() @ b[expert].float().T).to(d.dtype)
