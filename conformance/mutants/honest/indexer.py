"""The indexer: scores, choice, both."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm5_hal.conformance.mutants.honest.calls import Args, Body, Product
from glm5_hal.conformance.mutants.honest.paging import RIGHT, Reading, read, requests
from glm5_hal.conformance.mutants.honest.products import matmul
from glm5_hal.formats import FORMATS


def logits(
    product: Product = matmul,
    reading: Reading = RIGHT,
    limit: Callable[[int, int, int], int] = lambda i, new, keys: keys - new + i + 1,
    heads: Callable[[Tensor, Tensor], Tensor] = lambda weights, scores: weights @ scores,
    relu: Callable[[Tensor], Tensor] = lambda s: s.clamp_min(0),
    weights: Callable[[Tensor], Tensor] = lambda w: w,
    nothing: float = -math.inf,
    scale_last: bool = False,
) -> Body:
    """indexer_logits. ``scale_last``: the keys' fp8 scale comes after the sum over heads, where there is one group."""

    def body(a: Args) -> Tensor:
        out = torch.full((len(a.q), a.max_seq_len), nothing)
        for r, start, stop, keys in requests(a):
            at = torch.arange(min(keys, a.max_seq_len))
            slots = reading.slot(a.block_table[r], at, a.index_cache.shape[1])
            late = scale_last and FORMATS[a.cache_format].group == a.q.shape[-1]
            how = Reading(scale=torch.ones_like) if late else reading
            rows = read(a.cache_format, [a.index_cache], slots, a.q.shape[-1], how)
            for t in range(start, stop):
                seen = rows[: max(limit(t - start, stop - start, keys), 0)]
                row = heads(weights(a.weights[t]), relu(product(a.q[t].float(), seen)))
                if late:
                    row = row * read(a.cache_format, [a.index_cache], slots, a.q.shape[-1], _SCALES)[: len(row), 0]
                out[t, : len(row)] = row
        return out

    return body


_SCALES = Reading(codes=lambda codes: torch.ones(codes.shape))


def heads_reversed(weights: Tensor, scores: Tensor) -> Tensor:
    out = torch.zeros(scores.shape[-1])
    for w, row in zip(weights.flip(0), scores.flip(0), strict=True):
        out = out + w * row
    return out


def sign_and_size(weights: Tensor, scores: Tensor) -> Tensor:
    """|w| goes into the score, its sign into the sum."""
    return ((scores * weights.abs()[:, None]) * weights.sign()[:, None]).sum(0)


def by_sort(row: Tensor, k: int) -> Tensor:
    return row.argsort(descending=True, stable=True)[:k]


def by_partition(row: Tensor, k: int) -> Tensor:
    """numpy's introselect: any choice among ties, in any order."""
    if k >= len(row):
        return torch.arange(len(row))
    return torch.from_numpy(np.argpartition(-row.numpy(), k - 1)[:k].copy())


def last_of_ties(row: Tensor, k: int) -> Tensor:
    return (len(row) - 1 - row.flip(0).argsort(descending=True, stable=True)[:k]) if len(row) else row.long()


def topk(
    best: Callable[[Tensor, int], Tensor] = by_sort,
    ascending: bool = True,
    eligible: Callable[[Tensor], Tensor] = lambda row: ~row.isnan() & (row > -torch.inf),
    fill: int = -1,
    length: Callable[[int], int] = lambda n: n,
) -> Body:
    """topk_indices, row by row."""

    def body(a: Args) -> Tensor:
        out = torch.full((len(a.scores), a.top_k), fill, dtype=torch.int32)
        for t, row in enumerate(a.scores.float()):
            row = row[: length(int(a.seq_lens[t]))]
            at = eligible(row).nonzero()[:, 0]
            found = at[best(row[at], a.top_k)]
            out[t, : len(found)] = (found.sort().values if ascending else found).int()
        return out

    return body


def indexer(score: Body | None = None, choose: Body | None = None) -> Body:
    """lightning_indexer, of a body for its scores and one for its choice."""
    score, choose = score or logits(), choose or topk()

    def body(a: Args) -> Any:
        width = a.block_table.shape[1] * a.index_cache.shape[1]
        scores = score(SimpleNamespace(**{**vars(a), "max_seq_len": width}))
        lengths = torch.full((len(scores),), width)
        return choose(SimpleNamespace(scores=scores, seq_lens=lengths, top_k=a.top_k))

    return body
