"""Routing, permuting, the experts' products, combining."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants.honest.calls import Args, Body, Product
from glm5_hal.conformance.mutants.honest.indexer import by_sort
from glm5_hal.conformance.mutants.honest.products import matmul


def route(
    sigmoid: Callable[[Tensor], Tensor] = lambda x: 1 / (1 + torch.exp(-x)),
    best: Callable[[Tensor, int], Tensor] = by_sort,
    masked: float = -math.inf,
    weigh_by_choice: bool = False,
    normalise: Callable[[Tensor], Tensor] = lambda w: w / (w.sum() + 1e-20),
    factor: Callable[[float], float] = lambda f: f,
    group_best: int = 2,
) -> Body:
    """moe_route, row by row."""

    def body(a: Args) -> tuple[Tensor, Tensor]:
        T = len(a.router_logits)
        weights, ids = torch.zeros(T, a.top_k), torch.zeros(T, a.top_k, dtype=torch.int32)
        for t, row in enumerate(a.router_logits.float()):
            s = (
                sigmoid(row)
                if a.scoring_func == "sigmoid"
                else torch.exp(row - row.max()) / torch.exp(row - row.max()).sum()
            )
            c = s if a.bias is None else s + a.bias.float()
            choice = c
            if a.n_group > 1:
                groups = c.reshape(a.n_group, -1).sort(-1, descending=True).values[:, :group_best].sum(-1)
                kept = by_sort(groups, a.topk_group)
                choice = torch.full_like(c, masked).reshape(a.n_group, -1)
                choice[kept] = c.reshape(a.n_group, -1)[kept]
                choice = choice.reshape(-1)
            chosen = best(choice, a.top_k)
            w = (c if weigh_by_choice else s)[chosen]
            w = normalise(w) if a.norm_topk_prob else w
            weights[t], ids[t] = w * factor(a.routed_scaling_factor), chosen.int()
        return weights, ids

    return body


def permute(
    order: Callable[[list[tuple[int, int, int]]], list[tuple[int, int, int]]] = sorted, tail: float = 0.0
) -> Body:
    """moe_permute, by counting. ``order`` sorts (expert, token, slot)."""

    def body(a: Args) -> tuple[Tensor, Tensor, Tensor]:
        T, K = a.topk_ids.shape
        ids = a.topk_ids.tolist()
        rows = order([(ids[t][k], t, k) for t in range(T) for k in range(K) if ids[t][k] >= 0])
        permuted = a.x.new_full((T * K, a.x.shape[1]), tail)
        inverse = torch.full((T, K), -1, dtype=torch.int32)
        counts = [0] * (a.num_experts + 1)
        for m, (e, t, k) in enumerate(rows):
            permuted[m], inverse[t, k] = a.x[t], m
            counts[e + 1] += 1
        return permuted, torch.tensor(counts).cumsum(0).int(), inverse

    return body


def gemm(
    product: Product = matmul,
    native: bool = False,
    tail: float = 0.0,
    expert: Callable[[int, int], int] = lambda e, n: e,
) -> Body:
    """grouped_gemm. ``native``: torch's own product of the storage dtype."""

    def body(a: Args) -> Any:
        y = a.x.new_full((len(a.x), a.weight.shape[1]), tail)
        for e, (start, stop) in enumerate(pairwise(a.expert_offsets.tolist())):
            if stop > start:
                x, w = a.x[start:stop], a.weight[expert(e, len(a.weight))]
                y[start:stop] = x @ w.T if native else product(x.float(), w.float()).to(y.dtype)
        return y

    return body


def combine(
    backwards: bool = False,
    shared_first: bool = False,
    rounded: bool = False,
    shared_scale: float = 1.0,
    row: Callable[[int], int | None] = lambda m: m if m >= 0 else None,
) -> Body:
    """moe_combine, token by token."""

    def body(a: Args) -> Tensor:
        T, K = a.inverse_ids.shape
        out = torch.zeros(T, a.y.shape[1])
        for t in range(T):
            if a.shared is not None and shared_first:
                out[t] = a.shared[t].float()
            for k in reversed(range(K)) if backwards else range(K):
                m = row(int(a.inverse_ids[t, k]))
                if m is not None:
                    out[t] += a.topk_weights[t, k] * a.y[m].float()
                    out[t] = out[t].to(a.y.dtype).float() if rounded else out[t]
        if a.shared is not None and not shared_first:
            out = out + a.shared.float() * shared_scale
        return out.to(a.y.dtype)

    return body


def experts(
    keep: bool = True,
    product: Product = matmul,
    halves: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda h: (h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]),
    weight: Callable[[Tensor], Tensor] = lambda w: w,
    limited: bool = True,
) -> Body:
    """moe_experts, fused token by token. ``keep``: intermediates stay in fp32."""

    def body(a: Args) -> Tensor:
        def stored(v: Tensor) -> Tensor:
            return v if keep else v.to(a.x.dtype).float()

        out = torch.zeros(a.x.shape) if a.shared is None else a.shared.float().clone()
        for t, row in enumerate(a.topk_ids.tolist()):
            for k, e in enumerate(row):
                if e >= 0:
                    hidden = stored(product(a.x[t : t + 1].float(), a.w_gate_up[e].float()))
                    g, u = halves(hidden)
                    if a.limit is not None and limited:
                        g, u = g.clamp(max=a.limit), u.clamp(-a.limit, a.limit)
                    hidden = stored(torch.nn.functional.silu(g) * u)
                    y = stored(product(hidden, a.w_down[e].float()))
                    out[t] = out[t] + weight(a.topk_weights[t, k]) * y[0]
        return out.to(a.x.dtype)

    return body
