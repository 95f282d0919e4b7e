"""Stand-ins for libraries that need a GPU: their signatures, their conventions and what they refuse, in plain torch.

Written from the interfaces, the tests' references and the checks of their host code: FlashMLA at 9241ae3, DeepGEMM at
54e2261. They say nothing of what the real ones compute on a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import adapters
import pytest
import torch
from adapters import put
from torch import Tensor

from glm5_hal.backends.cuda import libraries
from glm5_hal.catalogue import Catalogue
from glm5_hal.conformance.results import Result
from glm5_hal.plugins import PluginRecord


def _bulk(*tensors: Tensor) -> None:
    """What a bulk copy takes: rows without gaps in them, everything at multiples of 16 bytes."""
    for t in tensors:
        assert t.stride(-1) == 1, "last dim not contiguous"
        assert t.data_ptr() % 16 == 0, "not aligned"
        assert all(s * t.itemsize % 16 == 0 for s in t.stride()[:-1]), "rows not aligned"


# --- FlashMLA --------------------------------------------------------------------------------------------------------


@dataclass
class SchedMeta:
    """Filled at the first call; good for the same shapes and the same numbers of keys."""

    config: tuple[Any, ...] | None = None
    lengths: list[int] | None = None


def flash_mla(patch: pytest.MonkeyPatch, arch: str = "sm_90") -> ModuleType:
    """The module, for one architecture. ``calls`` lists what was called, with the schedule."""
    calls: list[tuple[str, Any]] = []

    def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[SchedMeta, None]:
        return SchedMeta(), None

    def flash_mla_sparse_fwd(
        q: Tensor,
        kv: Tensor,
        indices: Tensor,
        sm_scale: float,
        d_v: int = 512,
        attn_sink: Tensor | None = None,
        topk_length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(("flash_mla_sparse_fwd", None))
        (s_q, h_q, d_qk), (s_kv, h_kv, _), topk = q.shape, kv.shape, indices.shape[2]
        assert q.dtype == kv.dtype == torch.bfloat16
        assert indices.dtype == torch.int32
        assert (h_q in (64, 128), h_kv, d_qk, d_v) == (True, 1, 576, 512)
        assert indices.shape == (s_q, 1, topk)
        assert topk > 0
        assert topk % (128 if arch == "sm_90" or h_q == 128 else 64) == 0
        _bulk(q, kv, indices)
        out, lse = q.new_empty(s_q, h_q, d_v), q.new_empty(s_q, h_q, dtype=torch.float32)
        for t in range(s_q):
            named = indices[t, 0]
            valid = (named >= 0) & (named < s_kv)
            keys = torch.where(valid[:, None], kv[named.masked_fill(~valid, 0).long(), 0], 0.0)
            out[t], lse[t] = _attend(q[t], keys, valid, sm_scale)
        return out, lse, lse

    def flash_mla_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor | None,
        cache_seqlens: Tensor | None,
        head_dim_v: int,
        tile_scheduler_metadata: SchedMeta,
        num_splits: None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        is_fp8_kvcache: bool = False,
        indices: Tensor | None = None,
        attn_sink: Tensor | None = None,
        extra_k_cache: Tensor | None = None,
        extra_indices_in_kvcache: Tensor | None = None,
        topk_length: Tensor | None = None,
        extra_topk_length: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        calls.append(("flash_mla_with_kvcache", tile_scheduler_metadata))
        assert isinstance(tile_scheduler_metadata, SchedMeta)
        assert num_splits is None
        (b, s_q, h_q, d), (N, page, h_k, width) = q.shape, k_cache.shape
        topk = None if indices is None else indices.shape[-1]
        config = (b, s_q, h_q, page, h_k, causal, is_fp8_kvcache, topk)
        lengths = None if cache_seqlens is None else cache_seqlens.tolist()
        if tile_scheduler_metadata.config is None:
            tile_scheduler_metadata.config, tile_scheduler_metadata.lengths = config, lengths
        assert (tile_scheduler_metadata.config, tile_scheduler_metadata.lengths) == (config, lengths), (
            "a stale schedule"
        )
        scale = d**-0.5 if softmax_scale is None else softmax_scale
        assert (b > 0, s_q, h_k, d, head_dim_v) == (True, 1, 1, 576, 512), "more than was asked of the stand-in"
        assert q.dtype == torch.bfloat16
        _bulk(q)
        out, lse = q.new_empty(b, s_q, h_q, 512), q.new_empty(b, h_q, s_q, dtype=torch.float32)
        if indices is not None:
            assert is_fp8_kvcache
            assert not causal
            assert topk is not None
            assert topk > 0
            assert topk % 64 == 0
            assert h_q in (64, 128)
            assert k_cache.dtype == torch.uint8
            assert (width, k_cache.stride(1)) == (656, 656)
            assert arch == "sm_90" or k_cache.stride(0) % 656 == 0
            assert indices.dtype == torch.int32
            for t in range(b):
                valid = indices[t, 0] != -1
                assert ((indices[t, 0] >= 0) & (indices[t, 0] < N * page) | ~valid).all(), "an illegal access"
                slot = indices[t, 0].masked_fill(~valid, 0).long()
                rows = k_cache[slot // page, slot % page, 0]
                out[t, 0], lse[t, :, 0] = _attend(q[t, 0], _dequantised(rows), valid, scale)
            return out, lse
        assert arch == "sm_90", "Dense decode MLA is only supported on SM90a architecture"
        assert block_table is not None
        assert cache_seqlens is not None
        assert (page, k_cache.dtype) == (64, q.dtype)
        assert block_table.dtype == cache_seqlens.dtype == torch.int32
        assert cache_seqlens.is_contiguous()
        _bulk(k_cache)
        for t, length in enumerate(cache_seqlens.tolist()):
            pages = block_table[t, : -(-length // page)].long()
            keys = k_cache[pages].flatten(0, 2)[:length]
            out[t, 0], lse[t, :, 0] = _attend(q[t, 0], keys, torch.ones(length, dtype=torch.bool), scale)
        return out, lse.masked_fill(lse.isnan(), torch.inf)  # so does the real one

    return put(
        patch, "flash_mla", get_mla_metadata=get_mla_metadata, flash_mla_sparse_fwd=flash_mla_sparse_fwd,
        flash_mla_with_kvcache=flash_mla_with_kvcache, calls=calls,
        flash_mla_interface=put(patch, "flash_mla.flash_mla_interface", FlashMLASchedMeta=SchedMeta),
    )  # fmt: skip


def _attend(q: Tensor, keys: Tensor, valid: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token: probabilities are rounded before the product with the values; lse is natural, +inf without a key."""
    scores = (q.float() @ keys.float().T * scale).masked_fill(~valid, -torch.inf)
    peak = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0, nan=0.0) if len(keys) else scores.new_zeros(len(q), 1)
    p = (scores - peak).exp()
    total = p.sum(-1, keepdim=True)
    values = torch.where(valid[:, None], keys[:, :512], 0.0)
    out = (p.to(q.dtype).float() @ values.float()) / total.masked_fill(total == 0, 1.0)
    lse = (total.log() + peak)[:, 0]
    return out.to(q.dtype), lse.masked_fill(total[:, 0] == 0, torch.inf)


def _dequantised(rows: Tensor) -> Tensor:
    """[n, 656] bytes as bfloat16: the scale is rounded to it first."""
    codes = rows[:, :512].contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (4, 128))
    scales = rows[:, 512:528].contiguous().view(torch.float32).bfloat16().float()
    latent = (codes * scales[..., None]).flatten(1).bfloat16()
    return torch.cat([latent, rows[:, 528:].contiguous().view(torch.bfloat16)], 1)


# --- DeepGEMM --------------------------------------------------------------------------------------------------------


def deep_gemm(patch: pytest.MonkeyPatch, block: int = 128) -> ModuleType:
    def m_grouped_bf16_gemm_nt_contiguous(
        a: Tensor,
        b: Tensor,
        d: Tensor,
        grouped_layout: Tensor,
        compiled_dims: str = "nk",
        use_psum_layout: bool = False,
        ensure_zero_padding: bool = True,
        expected_m_for_psum_layout: int | None = None,
    ) -> None:
        (m, k), (groups, n, _) = a.shape, b.shape
        assert a.dtype == b.dtype == d.dtype == torch.bfloat16
        assert grouped_layout.dtype == torch.int32
        assert grouped_layout.is_contiguous()
        assert grouped_layout.shape == (m,)
        assert (d.shape, b.shape[2]) == ((m, n), k)
        assert k % 64 == 0
        assert b.stride(0) == n * k
        assert m % block == 0
        _bulk(a, b, d)
        d.fill_(torch.nan)  # what no block computes is not written
        for start in range(0, m, block):
            whose = grouped_layout[start : start + block]
            expert = int(whose[0])
            if expert < 0:
                assert (whose < 0).all(), "a block that begins with padding is left out"
                continue
            assert expert < groups
            assert ((whose == expert) | (whose == -1)).all(), "a block of two experts"
            rows = slice(start, start + block)
            d[rows] = (a[rows].float() @ b[expert].float().T).to(d.dtype)

    return put(
        patch, "deep_gemm", get_m_alignment_for_contiguous_layout=lambda: block,
        m_grouped_bf16_gemm_nt_contiguous=m_grouped_bf16_gemm_nt_contiguous,
    )  # fmt: skip


# --- judging them ----------------------------------------------------------------------------------------------------


def emulated(kernels: Any = libraries.adapted, arch: str = "sm_90") -> PluginRecord:
    """A backend of the adapters on CPU tensors."""
    return adapters.emulated(kernels, arch)


def alone(arch: str = "sm_90") -> AbstractContextManager[Catalogue]:
    return adapters.alone(libraries.adapted, arch)


def judged(op: str, axes: dict[str, Any], arch: str = "sm_90", **more: Any) -> Result:
    """What the suite says of an adapter at one point: by all of its checks, or by these."""
    return adapters.judged(libraries.adapted, arch, op, axes, **more)
