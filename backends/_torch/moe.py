"""Routing, permuting, the experts' products, combining.

Legend: T tokens, K experts per token, E experts, D hidden size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from glm5_hal.backend import kernel
from glm5_hal.backends._torch.numbers import accumulation, in_host_memory
from glm5_hal.ops._common.products import multiply
from glm5_hal.plan import host_list

#: Elements of y that are combined at a time on a CPU.
BLOCK = 1 << 18


@kernel("moe_route", "torch", provides=("deterministic", "batch_invariant", "canonical_ties", "graph_safe"))
def moe_route(
    router_logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    scoring_func: str = "sigmoid",
) -> tuple[Tensor, Tensor]:
    if scoring_func == "sigmoid":  # not torch.sigmoid, whose bits depend on the place in the batch (elementary.py)
        scores = torch.neg(router_logits).exp_().add_(1.0).reciprocal_().contiguous()
    else:
        scores = torch.softmax(router_logits, -1).contiguous()
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        T, E = choice.shape
        groups = choice.view(T, n_group, E // n_group).topk(2, -1).values.sum(-1)
        away = torch.ones_like(groups, dtype=torch.bool).scatter_(1, _best(groups, topk_group), False)
        choice = choice.masked_fill(away.repeat_interleave(E // n_group, 1), -torch.inf)
    ids = _best(choice, top_k)
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights.mul_(routed_scaling_factor), ids.int()


def _best(scores: Tensor, k: int) -> Tensor:
    """Places of the k largest, largest first, equals by the lower index: [T, k]."""
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    # topk breaks ties as it likes, so there must be none: the bits of a float order like its value once those of
    # negative numbers are turned over, and the place goes below them. A fifth of the time of a stable sort.
    E = scores.shape[1]
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is +0.0
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    unique = key.mul_(1 << 32).add_(torch.arange(E - 1, -1, -1, device=scores.device))
    return (E - 1) - (unique.topk(k, -1).values & 0xFFFFFFFF)


@kernel("moe_permute", "torch", provides=("deterministic", "graph_safe"))
def moe_permute(x: Tensor, topk_ids: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    T, K = topk_ids.shape
    ids = topk_ids.reshape(-1)
    experts, order = ids.masked_fill(ids < 0, num_experts).sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=ids.dtype, device=x.device)
    offsets = torch.searchsorted(experts, bounds, out_int32=True)
    # Rows that no expert takes come last. They are copies of a row of zeros, so that no length need be read.
    absent = experts == num_experts
    tokens = (order // max(K, 1)).masked_fill_(absent, T)
    permuted = torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, tokens)
    rows = torch.arange(T * K, dtype=torch.int32, device=x.device).masked_fill_(absent, -1)
    return permuted, offsets, torch.empty_like(rows).scatter_(0, order, rows).view(T, K)


@kernel("grouped_gemm", "torch", provides=("deterministic",))
def grouped_gemm(x: Tensor, weight: Tensor, expert_offsets: Tensor, *, weight_format: str = "plain") -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for e, (start, end) in enumerate(pairwise(host_list(expert_offsets))):
        if start < end:
            multiply(x[start:end], weight[e].T, out=y[start:end])
    return y


@kernel("moe_combine", "torch", provides=("deterministic", "batch_invariant", "graph_safe"))
def moe_combine(y: Tensor, topk_weights: Tensor, inverse_ids: Tensor, shared: Tensor | None = None) -> Tensor:
    weights = topk_weights.to(accumulation(y))
    if y.numel() == 0:
        out = weights.new_zeros(len(weights), y.shape[1])
    else:
        out = (_bags if in_host_memory(y) else _slot_by_slot)(y, weights, inverse_ids)
    if shared is not None:
        out += shared
    return out.to(y.dtype)


def _slot_by_slot(y: Tensor, weights: Tensor, inverse_ids: Tensor) -> Tensor:
    out = weights.new_zeros(len(weights), y.shape[1])
    for rows, weight in zip(inverse_ids.T, weights.T, strict=True):
        part = y.index_select(0, rows.clamp(min=0)).to(out.dtype).mul_(weight[:, None])
        out += part.masked_fill_((rows < 0)[:, None], 0.0)  # not multiplied by zero: what stands in may be NaN
    return out


def _bags(y: Tensor, weights: Tensor, inverse_ids: Tensor) -> Tensor:
    """As weighted bags of embeddings, for which CPUs have a kernel that reads each row once.

    That kernel wants y and its weights in one dtype: y is widened a block of columns at a time, which the cache holds.
    """
    here = inverse_ids >= 0
    counts = here.sum(-1, dtype=inverse_ids.dtype)
    starts = counts.cumsum(0, dtype=inverse_ids.dtype) - counts
    rows, weights_of_rows = inverse_ids[here], weights[here]

    def combined(values: Tensor) -> Tensor:
        return functional.embedding_bag(rows, values, starts, mode="sum", per_sample_weights=weights_of_rows)

    if y.dtype == weights.dtype:
        return combined(y)
    (M, D), out = y.shape, weights.new_empty(len(weights), y.shape[1])
    width = min(D, max(BLOCK // M, 64))
    room = weights.new_empty(M * width)
    for start in range(0, D, width):
        some = y[:, start : start + width]
        wide = room[: some.numel()].view(some.shape).copy_(some)
        out[:, start : start + width] = combined(wide)
    return out
