"""A stand-in for Hygon's flash_mla, which is closed: the signature and the conventions that its callers rely on, and
the checks of the FlashMLA that it follows, in plain torch. It says nothing of what the real one computes on a DCU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from adapters import attend, put
from torch import Tensor


def flash_mla(patch: pytest.MonkeyPatch) -> ModuleType:
    interface = put(
        patch, "flash_mla.flash_mla_interface", flash_mla_sparse_fwd=flash_mla_sparse_fwd, FlashMLASchedMeta=object
    )
    return put(patch, "flash_mla", flash_mla_sparse_fwd=flash_mla_sparse_fwd, flash_mla_interface=interface)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: None = None,
    topk_length: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    (s_q, h_q, d_qk), (s_kv, h_kv, width), topk = q.shape, kv.shape, indices.shape[2]
    assert q.dtype == kv.dtype == torch.bfloat16
    assert indices.dtype == torch.int32
    assert (h_q in (64, 128), h_kv, d_qk, width, d_v) == (True, 1, 576, 576, 512)
    assert indices.shape == (s_q, 1, topk)
    assert topk > 0
    assert topk % 128 == 0
    assert q.stride(-1) == kv.stride(-1) == indices.stride(-1) == 1
    # What it says of a token without a key is not said.
    out, lse = q.new_full((s_q, h_q, 512), 7.0), q.new_full((s_q, h_q), 7.0, dtype=torch.float32)
    for t in range(s_q):
        named = indices[t, 0]
        named = named[(named >= 0) & (named < s_kv)].long()
        if len(named):
            out[t], lse[t] = attend(q[t], kv[named, 0], sm_scale)
    return out, lse, lse
