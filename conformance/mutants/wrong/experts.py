"""Routing, permutation, products and combination of experts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args
from glm5_hal.conformance.mutants.wrong.attention import in_storage, one_by_one
from glm5_hal.conformance.mutants.wrong.base import FP32, Wrong, bodied
from glm5_hal.conformance.mutants.wrong.indexer import one_worse, with_duplicates


def the_experts() -> list[Wrong]:
    routes = {
        "weights with the bias": honest.route(weigh_by_choice=True),
        "bias left out": lambda a: honest.route()(Args(**{**vars(a), "bias": None})),
        "not renormalised": honest.route(normalise=lambda w: w),
        "always renormalised": lambda a: honest.route()(Args(**{**vars(a), "norm_topk_prob": True})),
        "scaling factor left out": honest.route(factor=lambda f: 1.0),
        "scaling factor twice": honest.route(factor=lambda f: f * f),
        "1e-6 for 1e-20": honest.route(normalise=lambda w: w / (w.sum() + 1e-6)),
        "softmax for sigmoid": lambda a: honest.route()(Args(**{**vars(a), "scoring_func": "softmax"})),
        "sigmoid for softmax": lambda a: honest.route()(Args(**{**vars(a), "scoring_func": "sigmoid"})),
        "groups ignored": lambda a: honest.route()(Args(**{**vars(a), "n_group": 1})),
        "groups by their best": honest.route(group_best=1),
        "one group too many": lambda a: honest.route()(
            Args(**{**vars(a), "topk_group": min(a.topk_group + 1, a.n_group)})
        ),
        "one group too few": lambda a: honest.route()(Args(**{**vars(a), "topk_group": max(a.topk_group - 1, 1)})),
        "masked experts at 0": honest.route(masked=0.0),
        "scores in bfloat16": honest.route(lambda x: torch.sigmoid(x.to(torch.bfloat16)).float()),
        "one expert twice": honest.route(best=with_duplicates),
        "the k-th passed over": honest.route(best=one_worse),
        "weights in another order": lambda a: (lambda w, i: (w.flip(1), i))(*honest.route()(a)),
    }
    found = [bodied("moe_route", name, body, dtypes=FP32) for name, body in routes.items()]
    found.append(
        bodied("moe_route", "other order of equals", honest.route(best=honest.last_of_ties), dtypes=FP32,
               provides=("deterministic", "canonical_ties"))
    )  # fmt: skip
    permutes = {
        "sorted by token": honest.permute(lambda rows: sorted(rows, key=lambda r: r[1:])),
        "slots backwards": honest.permute(lambda rows: sorted(rows, key=lambda r: (r[0], -r[1], -r[2]))),
        "tail left as it is": honest.permute(tail=7.0),
        "offsets without the first": lambda a: (lambda p, o, i: (p, o.roll(-1), i))(*honest.permute()(a)),
        "-1 for expert 0": lambda a: honest.permute()(Args(**{**vars(a), "topk_ids": a.topk_ids.clamp_min(0)})),
        "inverse is the order": _forward_ids,
        "a token dropped where an expert is full": honest.permute(_of_capacity(2)),
        "one row of an expert lost": honest.permute(lambda rows: sorted(rows)[:-1]),
        "offsets of counts without -1 shifted": lambda a: (lambda p, o, i: (p, (o + 1).clamp_max(o[-1]), i))(
            *honest.permute()(a)
        ),
    }
    found += [bodied("moe_permute", name, body) for name, body in permutes.items()]
    gemms = {
        "the next expert's weight": honest.gemm(expert=lambda e, n: (e + 1) % n),
        "first expert's weight": honest.gemm(expert=lambda e, n: 0),
        "weight transposed": _transposed,
        "tail not cleared": honest.gemm(tail=3.0),
        "accumulated in bfloat16": honest.gemm(in_storage),
        "accumulated in bfloat16 one by one": honest.gemm(one_by_one),
        "padded to 8 rows": _whole_tiles,
        "last row of an expert lost": _last_row_lost,
    }
    found += [bodied("grouped_gemm", name, body) for name, body in gemms.items()]
    combines = {
        "shared part scaled": honest.combine(shared_scale=2.5),
        "shared part left out": honest.combine(shared_scale=0.0),
        "accumulated in storage": honest.combine(rounded=True),
        "no weight below zero": lambda a: honest.combine()(
            Args(**{**vars(a), "topk_weights": a.topk_weights.clamp_min(0.0)})
        ),
        "-1 read as the last row": honest.combine(row=lambda m: m),
        "-1 read as row 0": honest.combine(row=lambda m: max(m, 0)),
        "weights in bfloat16": lambda a: honest.combine()(
            Args(**{**vars(a), "topk_weights": a.topk_weights.to(torch.float8_e4m3fn).float()})
        ),
        "last slot left out": lambda a: honest.combine()(
            Args(**{**vars(a), "inverse_ids": _without_last(a.inverse_ids)})
        ),
    }
    found += [bodied("moe_combine", name, body) for name, body in combines.items()]
    fused = {
        "up before gate": honest.experts(halves=lambda h: (h[:, h.shape[1] // 2 :], h[:, : h.shape[1] // 2])),
        "interleaved gate and up": honest.experts(halves=lambda h: (h[:, 0::2], h[:, 1::2])),
        "unweighted": honest.experts(weight=torch.ones_like),
        "weights squared": honest.experts(weight=torch.square),
        "no clamp": honest.experts(limited=False),
        "accumulated in bfloat16": honest.experts(product=in_storage),
        "shared part left out": lambda a: honest.experts()(Args(**{**vars(a), "shared": None})),
        "one slot left out": lambda a: honest.experts()(Args(**{**vars(a), "topk_ids": _without_last(a.topk_ids)})),
    }
    found += [bodied("moe_experts", name, body) for name, body in fused.items()]
    return found


def _without_last(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, :1], -1)], 1) if ids.shape[1] > 1 else ids


def _of_capacity(most: int) -> Callable[[list[tuple[int, int, int]]], list[tuple[int, int, int]]]:
    """No more than so many rows an expert, as a fixed buffer has room for."""

    def order(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        by_expert = itertools.groupby(sorted(rows), key=lambda row: row[0])
        return [row for _, group in by_expert for row in itertools.islice(group, most)]

    return order


def _forward_ids(a: Args) -> Any:
    permuted, offsets, inverse = honest.permute()(a)
    flat = inverse.flatten()
    forward = torch.full_like(flat, -1)
    forward[flat[flat >= 0].long()] = (flat >= 0).nonzero()[:, 0].int()
    return permuted, offsets, forward.view(inverse.shape)


def _transposed(a: Args) -> Any:
    E, N, K = a.weight.shape
    return honest.gemm()(Args(**{**vars(a), "weight": a.weight.reshape(E, K, N).mT.contiguous()}))


def _whole_tiles(a: Args) -> Any:
    """Only whole tiles of rows, where an expert has one."""
    y = honest.gemm()(a)
    for start, stop in itertools.pairwise(a.expert_offsets.tolist()):
        if stop - start > 4:
            y[start + (stop - start) // 4 * 4 : stop] = 0
    return y


def _last_row_lost(a: Args) -> Any:
    y = honest.gemm()(a)
    ends = a.expert_offsets[1:][a.expert_offsets.diff() > 0].long() - 1
    return y.index_fill(0, ends, 0)
