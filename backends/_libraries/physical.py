"""From this library's conventions to those of kernels that know no requests: tokens one by one, keys by their physical
place. Everything stays on the device, and no shape depends on a value.

Legend: T tokens, B requests, K indices per token, M pages per request, N pages, P page size, W row width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_hal.capability import when
from glm5_hal.context import capturing
from glm5_hal.plan import current_plan, schedule
from glm5_hal.signature import Signature

#: Bytes that a bulk copy on the device wants a tensor to start at a multiple of.
ALIGNMENT = 16


def _whole_rows(call: Signature) -> bool:
    cache = call.tensors["kv_cache"]
    if cache is None or cache.strides is None or cache.shape[0] < 2:
        return True
    return cache.strides[0] % cache.shape[2] == 0


#: Then one number says where a key is.
whole_rows = when(
    _whole_rows,
    "the cache's pages are a whole number of rows apart",
    "allocate the cache in one piece, or with pages of padding rows",
    reads=(("kv_cache", "strides"), ("kv_cache", "shape")),
)


def requests_of(cu_seqlens_q: Tensor, tokens: int) -> Tensor:
    """The request of each token: how many requests end at or before it, [T] int64."""
    at = torch.arange(tokens, dtype=cu_seqlens_q.dtype, device=cu_seqlens_q.device)
    return torch.searchsorted(cu_seqlens_q[1:].contiguous(), at, right=True)


def visible(cu_seqlens_q: Tensor, seq_lens: Tensor, request: Tensor) -> Tensor:
    """How many keys each token sees under the causal mask, bottom-right aligned, [T] int32."""
    after = cu_seqlens_q.index_select(0, request + 1) - torch.arange(
        len(request), dtype=cu_seqlens_q.dtype, device=request.device
    )  # tokens of its request from this one on
    return (seq_lens.index_select(0, request) - after + 1).clamp_min_(0)


def rows(cache: Tensor) -> tuple[Tensor, int]:
    """A cache [N, P, W] as rows [n, 1, W], and how many of them one page is from the next."""
    N, P, W = cache.shape
    apart = P if N < 2 else cache.stride(0) // W
    return cache.as_strided(((N - 1) * apart + P, 1, W), (W, W, 1)), apart


def slots(indices: Tensor, block_table: Tensor, request: Tensor, page: int, apart: int, multiple: int) -> Tensor:
    """Where the keys lie that local ``indices [T, K]`` name, -1 for none: [T, K'] int32, with K' the next multiple."""
    T, K = indices.shape
    local = indices.clamp_min(0)
    block = block_table[request[:, None], local // page]
    found = indices.new_full((T, -(-K // multiple) * multiple), -1)
    found[:, :K] = torch.where(indices >= 0, block * apart + local % page, -1)
    return found


def compacted(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Places [T, K] without the -1 among them, and how many each token has, [T] int32."""
    T, K = chosen.shape
    valid = chosen >= 0
    place = torch.where(valid, valid.cumsum(1) - 1, K)  # the last column is for those that are left out
    table = chosen.new_zeros(T, K + 1).scatter_(1, place, chosen.clamp_min(0))[:, :K]
    return _safe(table, count := valid.sum(1, dtype=torch.int32)), count


def everything(
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, request: Tensor, page: int, apart: int
) -> tuple[Tensor, Tensor]:
    """The place of every key that a token sees, [T, M·P], and how many there are, [T] int32."""
    at = torch.arange(block_table.shape[1] * page, dtype=block_table.dtype, device=block_table.device)
    table = block_table.index_select(0, request).index_select(1, at // page) * apart + at % page
    return _safe(table, seen := visible(cu_seqlens_q, seq_lens, request)), seen


def _safe(table: Tensor, count: Tensor) -> Tensor:
    """What lies behind a token's last place names its first, which it reads anyway; 0 where it has none."""
    if table.shape[1] == 0:
        return table
    inside = torch.arange(table.shape[1], device=table.device) < count[:, None]
    return torch.where(inside, table, table[:, :1].masked_fill(count[:, None] == 0, 0))


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and at an address that bulk copies take: itself, or a copy."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def per_step(key: Any, build: Callable[[], Any], seq_lens: Tensor, cu_seqlens_q: Tensor) -> Any:
    """What layers of one step may share: built anew where there is no plan of these very lengths, and in a graph, which
    outlives the plan."""
    plan = current_plan()
    if plan is None or capturing():
        return build()
    pairs = ((plan.seq_lens, seq_lens), (plan.cu_seqlens_q, cu_seqlens_q))
    if any(ours.data_ptr() != given.data_ptr() or ours.shape != given.shape for ours, given in pairs):
        return build()
    return schedule(key, build)
