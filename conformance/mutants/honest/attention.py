"""Attention of every form, token by token.

Legend: W absorbed width L+R, n keys, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants.honest.calls import Args, Body, Product
from glm5_hal.conformance.mutants.honest.paging import RIGHT, Reading, held_of, read, requests
from glm5_hal.conformance.mutants.honest.products import (
    blocked,
    einsum,
    halving,
    in_double,
    matmul,
    row_by_row,
    sequential,
)

#: Long rows have longer tiles: more of them would show nothing more, and take their time. Their length is a power of
#: two, as that of real ones: equal probabilities over it are exact in any dtype.
MOST_TILES = 24


@dataclass(frozen=True)
class Softmax:
    """How one head's attention is computed.

    ``p``: rounded to storage "before" its normalisation, "after" it, or "kept". ``summed``: the sum is of the "rounded"
    P or of the "exact" one. ``tile``: keys per step of an online softmax, 0 for all at once. ``split``: tiles are
    independent, each with its own lse, and merged at the end.
    """

    p: str = "kept"
    summed: str = "exact"
    tile: int = 0
    split: bool = False
    base2: bool = False
    fold: bool = False
    product: Product = matmul
    weigh: Product = matmul
    scale: float = 1.0
    score: Callable[[Tensor], Tensor] = lambda s: s
    lse: Callable[[Tensor], Tensor] = lambda lse: lse

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q [..., m, W] of the storage dtype, keys [..., n, W], values [..., n, D] -> out [..., m, D], lse [..., m]."""
        storage, q, keys, values = q.dtype, q.float(), keys.float(), values.float()
        factor = scale * self.scale * (math.log2(math.e) if self.base2 else 1.0)
        scores = self.product(q * factor, keys) if self.fold else self.product(q, keys) * factor
        scores = self.score(scores)
        step = max(self.tile, 1 << ((keys.shape[-2] - 1) // MOST_TILES).bit_length())
        tiles = [slice(i, i + step) for i in range(0, keys.shape[-2], step)] if self.tile else [slice(None)]
        parts = [self._tile(scores[..., t], values[..., t, :], storage) for t in tiles]
        out, total, exact, peak = parts[0]
        for more, sum_, exact_, top in parts[1:]:
            new = torch.maximum(peak, top)
            a, b = self._exp(peak - new), self._exp(top - new)
            out, total, exact, peak = out * a + more * b, total * a + sum_ * b, exact * a + exact_ * b, new
        lse = (peak + exact.log2()) * math.log(2.0) if self.base2 else peak + exact.log()
        return out / total, self.lse(lse[..., 0])

    def _exp(self, x: Tensor) -> Tensor:
        return torch.exp2(x) if self.base2 else torch.exp(x)

    def _tile(self, scores: Tensor, values: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted values, what they are to be divided by, the sum of P, its largest score."""
        peak = scores.amax(-1, keepdim=True)
        peak = peak.masked_fill(peak == -torch.inf, -1e30)
        p = self._exp(scores - peak)
        total = exact = p.sum(-1, keepdim=True)
        if self.p == "before":
            p = p.to(storage).float()
            total = p.sum(-1, keepdim=True) if self.summed == "rounded" else exact
        if self.p == "after":
            p = (p / total).to(storage).float()
        out = self.weigh(p, values.transpose(-1, -2).contiguous())
        if self.split:  # each part as a kernel of its own would leave it: normalised, with an lse
            out, ones = out if self.p == "after" else out / total, torch.ones_like(total)
            return out, ones, ones, peak + (total.log2() if self.base2 else total.log())
        return (out * total if self.p == "after" else out), total, exact, peak


PLAIN = Softmax()

#: Honest ways, for every op of attention.
WAYS: dict[str, Softmax] = {
    "plain": PLAIN,
    "p stored, rounded sum": Softmax(p="before", summed="rounded"),
    "p stored, exact sum, tiles of 8": Softmax(p="before", tile=8),
    "p normalised, then stored": Softmax(p="after"),
    "base 2, scale in q": Softmax(base2=True, fold=True, p="before", tile=16),
    "split keys merged by lse": Softmax(split=True, tile=8, p="after"),
    "split keys, base 2": Softmax(split=True, tile=5, base2=True, fold=True, product=einsum),
    "sequential sums": Softmax(product=sequential, weigh=sequential, p="before", summed="rounded"),
    "pairwise sums": Softmax(product=halving, weigh=halving),
    "blocked sums, row by row": Softmax(product=blocked, weigh=row_by_row, tile=32, p="before"),
    "sums in double": Softmax(product=in_double, weigh=in_double),
}


def empty(q: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    return q.new_zeros(*q.shape[:2], latent), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)


def decode(
    how: Softmax = PLAIN,
    reading: Reading = RIGHT,
    limit: Callable[[int, int, int], int] = lambda i, new, keys: keys - new + i + 1,
    blank: Callable[[Tensor, int], tuple[Tensor, Tensor]] = empty,
    order: Callable[[Tensor], Tensor] = lambda at: at,
) -> Body:
    """mla_decode. ``limit``: how many keys token i of ``new`` sees of ``keys``."""

    def body(a: Args) -> Any:
        out, lse = blank(a.q, a.kv_lora_rank)
        for r, start, stop, keys in requests(a):
            for t in range(start, stop):
                at = order(torch.arange(max(limit(t - start, stop - start, keys), 0)))
                if len(at):
                    slots = reading.slot(a.block_table[r], at, a.kv_cache.shape[1])
                    rows = read(a.cache_format, held_of(a), slots, a.kv_lora_rank, reading)
                    found = how(a.q[t], rows, rows[:, : a.kv_lora_rank], a.scale)
                    out[t], lse[t] = found
        return out, lse

    return body


def sparse(
    how: Softmax = PLAIN,
    reading: Reading = RIGHT,
    chosen: Callable[[Tensor, int], Tensor] = lambda row, keys: row[row >= 0].long(),
    blank: Callable[[Tensor, int], tuple[Tensor, Tensor]] = empty,
) -> Body:
    """sparse_mla. ``chosen``: the positions that a row of indices names."""

    def body(a: Args) -> Any:
        out, lse = blank(a.q, a.kv_lora_rank)
        for r, start, stop, keys in requests(a):
            for t in range(start, stop):
                at = chosen(a.indices[t], keys)
                if len(at):
                    slots = reading.slot(a.block_table[r], at, a.kv_cache.shape[1])
                    rows = read(a.cache_format, held_of(a), slots, a.kv_lora_rank, reading)
                    out[t], lse[t] = how(a.q[t], rows, rows[:, : a.kv_lora_rank], a.scale)
        return out, lse

    return body


def prefill(
    how: Softmax = PLAIN,
    limit: Callable[[int, int, int], int] = lambda i, new, keys: keys - new + i + 1,
    blank: Callable[[Tensor, int], tuple[Tensor, Tensor]] = empty,
) -> Body:
    """mla_prefill, token by token."""

    def body(a: Args) -> Any:
        out, lse = blank(a.q, a.v.shape[-1])
        queries, keys = a.cu_seqlens_q.tolist(), a.cu_seqlens_k.tolist()
        for (start, stop), (low, high) in zip(pairwise(queries), pairwise(keys), strict=True):
            for t in range(start, stop):
                n = limit(t - start, stop - start, high - low) if a.causal else high - low
                if n > 0:
                    keys_of, values = (x[low : low + n].transpose(0, 1) for x in (a.k, a.v))
                    found = how(a.q[t, :, None], keys_of, values, a.scale)
                    out[t], lse[t] = found[0][:, 0], found[1][:, 0]
        return out, lse

    return body
