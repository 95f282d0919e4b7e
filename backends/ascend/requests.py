"""Ragged batches and chosen keys as the vendor's ops have them. All of it stays on the device.

Legend: T tokens, B requests, K indices per token, M pages per request, N pages, P page size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def requests_of(cu_seqlens_q: Tensor, tokens: int) -> Tensor:
    """The request of each token: how many requests end at or before it, [T] int64."""
    at = torch.arange(tokens, dtype=cu_seqlens_q.dtype, device=cu_seqlens_q.device)
    return torch.searchsorted(cu_seqlens_q[1:].contiguous(), at, right=True)


def visible(ends_q: Tensor, keys: Tensor, request: Tensor) -> Tensor:
    """How many keys each token sees, bottom-right aligned; 0 or less where it sees none, [T]."""
    at = torch.arange(len(request), dtype=ends_q.dtype, device=request.device)
    return keys.index_select(0, request) - ends_q.index_select(0, request) + at + 1


def valid_first(indices: Tensor) -> Tensor:
    """Every row's indices that are not -1, in their order, then -1, [T, K] int32."""
    K = indices.shape[1]
    place = torch.arange(K, dtype=indices.dtype, device=indices.device)
    order = torch.where(indices >= 0, place, place + K).sort(-1).values  # sorting by place needs no stable sort
    return indices.gather(1, (order % K).long())
