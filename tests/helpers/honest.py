"""Kernels that share no code with the references: each op computed in ways that real kernels differ in.

A *body* takes a call's arguments as one namespace; `kernel` gives it the op's signature. What a body may do in more
than one way is an argument of its own, so that a wrong kernel is an honest one with one thing changed.

Legend: T tokens, H heads, W absorbed width L+R, n keys, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glm5_hal.ops import specs
from glm5_hal.state import FORMATS

Args = SimpleNamespace
Body = Callable[[Any], Any]
Product = Callable[[Tensor, Tensor], Tensor]


def kernel(op: str, body: Body) -> Callable[..., Any]:
    """A function with the op's signature."""
    signature = specs()[op].signature

    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return body(SimpleNamespace(**bound.arguments))

    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


# --- sums and products: [m, k] x [n, k] -> [m, n] in fp32 ------------------------------------------------------------


def sequential_sum(terms: Tensor) -> Tensor:
    """Over the last dim in fp32, one after the other (torch.cumsum accumulates in double on a CPU)."""
    if terms.shape[-1] == 0:
        return terms.new_zeros(terms.shape[:-1])
    return torch.from_numpy(np.add.accumulate(terms.numpy(), axis=-1, dtype=np.float32)[..., -1].copy())


def pairwise_sum(terms: Tensor) -> Tensor:
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = torch.nn.functional.pad(terms, (0, 1))
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.transpose(-1, -2)


def einsum(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("...mk,...nk->...mn", a, b)


def row_by_row(a: Tensor, b: Tensor) -> Tensor:
    rows = [(b @ row[..., None])[..., 0] for row in a.unbind(-2)]
    return torch.stack(rows, -2) if rows else a.new_zeros(*a.shape[:-1], b.shape[-2])


def sequential(a: Tensor, b: Tensor) -> Tensor:
    return sequential_sum(a[..., :, None, :] * b[..., None, :, :])


def blocked(a: Tensor, b: Tensor) -> Tensor:
    """In blocks of 16, as a tile's inner loop is."""
    blocks = [x @ y.transpose(-1, -2) for x, y in zip(a.split(16, -1), b.split(16, -1), strict=True)]
    out = blocks[0]
    for block in blocks[1:]:
        out = out + block
    return out


def halving(a: Tensor, b: Tensor) -> Tensor:
    return pairwise_sum(a[..., :, None, :] * b[..., None, :, :])


def in_double(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().transpose(-1, -2)).float()


# --- paged caches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How rows of a paged cache are found and decoded; the defaults are right."""

    slot: Callable[[Tensor, Tensor, int], Tensor] = lambda pages, at, page: pages[at // page].long() * page + at % page
    fields: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda fields: fields
    block_major: bool | None = None
    codes: Callable[[Tensor], Tensor] = lambda codes: codes.view(torch.float8_e4m3fn).float()
    scale: Callable[[Tensor], Tensor] = lambda scale: scale


RIGHT = Reading()


def read(cache_format: str, held: list[Tensor], slots: Tensor, latent: int, how: Reading = RIGHT) -> Tensor:
    """Rows [n, width] in fp32: latent (or index key), then the rope dims if there are any."""
    fmt = FORMATS[cache_format]
    page, at = slots // held[0].shape[1], slots % held[0].shape[1]
    if not fmt.group:
        return torch.cat([cache[page, at].float() for cache in held], -1)
    groups = latent // fmt.group
    widths = {"latent": latent, "scale": 4 * groups}
    widths["rope"] = held[0].shape[-1] - sum(widths.values())
    part, start = {}, 0
    major = fmt.block_major if how.block_major is None else how.block_major
    for name in how.fields(fmt.fields):
        width = widths[name]
        if major:
            whole = held[0].reshape(len(held[0]), -1)
            rows = [whole[p, start + i * width :][:width] for p, i in zip(page.tolist(), at.tolist(), strict=True)]
            part[name] = torch.stack(rows) if rows else held[0].new_zeros(0, width)
            start += width * held[0].shape[1]
        else:
            part[name] = held[0][page, at, start : start + width].contiguous()
            start += width
    values = how.codes(part["latent"]).reshape(len(slots), groups, fmt.group)
    rows = (values * how.scale(part["scale"].view(torch.float32))[..., None]).reshape(len(slots), latent)
    return torch.cat([rows, part["rope"].view(torch.bfloat16).float()], -1) if "rope" in part else rows


def held_of(a: Args) -> list[Tensor]:
    return [a.kv_cache] if a.rope_cache is None else [a.kv_cache, a.rope_cache]


def requests(a: Args) -> Iterator[tuple[int, int, int, int]]:
    """(request, first token, one past its last, cached keys)."""
    for r, (start, stop) in enumerate(pairwise(a.cu_seqlens_q.tolist())):
        yield r, start, stop, int(a.seq_lens[r])


# --- attention -------------------------------------------------------------------------------------------------------


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
        tiles = [slice(i, i + self.tile) for i in range(0, keys.shape[-2], self.tile)] if self.tile else [slice(None)]
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
    bounds: Callable[[list[int]], list[int]] = lambda offsets: offsets,
) -> Body:
    """mla_prefill, token by token."""

    def body(a: Args) -> Any:
        out, lse = blank(a.q, a.v.shape[-1])
        queries, keys = a.cu_seqlens_q.tolist(), bounds(a.cu_seqlens_k.tolist())
        for (start, stop), (low, high) in zip(pairwise(queries), pairwise(keys), strict=True):
            for t in range(start, stop):
                n = limit(t - start, stop - start, high - low) if a.causal else high - low
                if n > 0:
                    keys_of, values = (x[low : low + n].transpose(0, 1) for x in (a.k, a.v))
                    found = how(a.q[t, :, None], keys_of, values, a.scale)
                    out[t], lse[t] = found[0][:, 0], found[1][:, 0]
        return out, lse

    return body


# --- the indexer -----------------------------------------------------------------------------------------------------


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
    """indexer_logits. ``scale_last``: the keys' fp8 scale comes after the sum over heads (one group)."""

    def body(a: Args) -> Tensor:
        out = torch.full((len(a.q), a.max_seq_len), nothing)
        for r, start, stop, keys in requests(a):
            at = torch.arange(min(keys, a.max_seq_len))
            slots = reading.slot(a.block_table[r], at, a.index_cache.shape[1])
            late = scale_last and FORMATS[a.cache_format].group
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


# --- cache writes ----------------------------------------------------------------------------------------------------


def power_by_log2(amax: Tensor, floor: str) -> Tensor:
    raw = (amax.clamp_min(1e-4) / 448) if floor == "amax" else (amax / 448).clamp_min(1e-4)
    return torch.exp2(torch.ceil(torch.log2(raw.double()))).float()


def power_by_bits(amax: Tensor, floor: str) -> Tensor:
    """The exponent's bits, up by one unless the mantissa is zero."""
    raw = (amax.clamp_min(1e-4) / 448) if floor == "amax" else (amax / 448).clamp_min(1e-4)
    bits = raw.view(torch.int32)
    return ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


@dataclass(frozen=True)
class Quantiser:
    """Rows to codes and scales; the defaults are right."""

    power: Callable[[Tensor, str], Tensor] = power_by_bits
    divide: Callable[[Tensor, Tensor], Tensor] = lambda x, s: x / s
    codes: Callable[[Tensor], Tensor] = to_e4m3
    floor: str | None = None
    nonfinite: bool = True

    def __call__(self, x: Tensor, group: int, floor: str) -> tuple[Tensor, Tensor]:
        groups = x.float().reshape(len(x), -1, group)
        broken = ~groups.isfinite().all(-1) if self.nonfinite else torch.zeros(groups.shape[:-1], dtype=torch.bool)
        amax = groups.abs().amax(-1).masked_fill(broken, 0)
        scale = self.power(amax, self.floor or floor).masked_fill(broken, 1)
        codes = self.codes(self.divide(groups, scale[..., None]).reshape(len(x), -1))
        wide = broken.repeat_interleave(group, 1)
        return codes.masked_fill(wide, 0x7F), scale


def write(
    quantise: Quantiser = Quantiser(),
    fields: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda fields: fields,
    block_major: bool | None = None,
    place: Callable[[int], int | None] = lambda slot: slot if slot >= 0 else None,
    rope: Callable[[Tensor], Tensor] = lambda rope: rope,
) -> Body:
    """mla_cache_write and index_cache_write, token by token."""

    def body(a: Args) -> None:
        index = hasattr(a, "index_cache")
        held = [a.index_cache] if index else held_of(a)
        latent, k_pe = (a.k, None) if index else (a.kv_c, rope(a.k_pe))
        fmt = FORMATS[a.cache_format]
        page = held[0].shape[1]
        if fmt.group:
            codes, scale = quantise(latent, fmt.group, fmt.floor)
            parts = {"latent": codes, "scale": scale.contiguous().view(torch.uint8)}
            if k_pe is not None:
                parts["rope"] = k_pe.to(torch.bfloat16).contiguous().view(torch.uint8)
        major = fmt.block_major if block_major is None else block_major
        for t, slot in enumerate(a.slot_mapping.tolist()):
            target = place(slot)
            if target is None:
                continue
            n, at = target // page, target % page
            if not fmt.group:
                rows = [latent[t]] if k_pe is None else [latent[t], k_pe[t]]
                for cache, row in zip(held, rows if len(rows) == len(held) else [torch.cat(rows)], strict=True):
                    cache[n, at] = row
            elif major:
                start, whole = 0, held[0][n].view(-1)
                for name in fields(fmt.fields):
                    width = parts[name].shape[-1]
                    whole[start + at * width : start + (at + 1) * width] = parts[name][t]
                    start += width * page
            else:
                held[0][n, at] = torch.cat([parts[name][t] for name in fields(fmt.fields)])

    return body


# --- elementary ------------------------------------------------------------------------------------------------------


def rms(
    mean: Callable[[Tensor], Tensor] = lambda x: (x * x).mean(-1, keepdim=True),
    root: Callable[[Tensor], Tensor] = torch.rsqrt,
    twice: bool = False,
    wide: torch.dtype = torch.float32,
) -> Callable[[Tensor, Tensor, float], Tensor]:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = x.to(wide) * root(mean(x.to(wide)) + eps)
        if twice:
            normed = normed.to(x.dtype).to(wide)
        return normed * weight.to(wide)

    return norm


def sequential_mean(x: Tensor) -> Tensor:
    return sequential_sum(x * x)[..., None] / x.shape[-1]


NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rsqrt": rms(),
    "1/sqrt, sequential": rms(sequential_mean, lambda v: 1 / v.sqrt()),
    "sum before division, pairwise": rms(lambda x: pairwise_sum(x * x)[..., None] / x.shape[-1], twice=True),
    "rounded before the weight": rms(twice=True),
    "in double": rms(wide=torch.float64),
    "by the vector norm": rms(lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]),
    "scaled by sqrt(D)": lambda x, w, eps: (
        x.float() * (math.sqrt(x.shape[-1]) / (x.float().square().sum(-1, keepdim=True) + x.shape[-1] * eps).sqrt())
        * w.float()
    ),
}  # fmt: skip


def rms_norm(norm: Callable[[Tensor, Tensor, float], Tensor] = NORMS["rsqrt"]) -> Body:
    return lambda a: norm(a.x, a.weight, a.eps).to(a.x.dtype)


def add_rms_norm(norm: Callable[[Tensor, Tensor, float], Tensor] = NORMS["rsqrt"], stored: bool = True) -> Body:
    """``stored``: the norm is of the rounded sum, else of the fp32 one."""

    def body(a: Args) -> tuple[Tensor, Tensor]:
        total = a.x.float() + a.residual.float()
        h = total.to(a.x.dtype)
        return norm(h if stored else total, a.weight, a.eps).to(a.x.dtype), h

    return body


def rope_by_parts(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """x·cos + turned(x)·sin, with tables as wide as x."""
    half = x.shape[-1] // 2
    shape = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
    if layout == "half":
        c, s = (torch.cat([t, t], -1) for t in (cos, sin))
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    else:
        c, s = (t.repeat_interleave(2, -1) for t in (cos, sin))
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)
    return x * c.reshape(shape) + turned * s.reshape(shape)


def rope_complex(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    half = x.shape[-1] // 2
    if x.numel() == 0:
        return torch.zeros(x.shape)
    pairs = x.unflatten(-1, (half, 2)) if layout == "interleaved" else x.unflatten(-1, (2, half)).transpose(-1, -2)
    turn = torch.complex(cos, sin).reshape(len(x), *[1] * (x.dim() - 2), half)
    y = torch.view_as_real(torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format)) * turn)
    return (y if layout == "interleaved" else y.transpose(-1, -2)).reshape(x.shape)


def rope(
    turn: Callable[[Tensor, Tensor, Tensor, str], Tensor] = rope_by_parts, wide: torch.dtype = torch.float32
) -> Body:
    return lambda a: turn(a.x.to(wide), a.cos.to(wide), a.sin.to(wide), a.layout).to(a.x.dtype)


def silu_by_division(g: Tensor) -> Tensor:
    return g / (1 + torch.exp(-g))


def silu_by_tanh(g: Tensor) -> Tensor:
    return 0.5 * g * (1 + torch.tanh(0.5 * g))


def silu_base_2(g: Tensor) -> Tensor:
    return g / (1 + torch.exp2(-g * math.log2(math.e)))


def silu_and_mul(
    silu: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
    twice: bool = False,
    gate: Callable[[Tensor, float], Tensor] = lambda g, limit: g.clamp(max=limit),
    up: Callable[[Tensor, float], Tensor] = lambda u, limit: u.clamp(-limit, limit),
) -> Body:
    def body(a: Args) -> Tensor:
        g, u = a.x.float().chunk(2, -1)
        if a.limit is not None:
            g, u = gate(g, a.limit), up(u, a.limit)
        first = silu(g)
        return ((first.to(a.x.dtype).float() if twice else first) * u).to(a.x.dtype)

    return body


def sylvester(D: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < D:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def hadamard(matrix: Callable[[int], Tensor] = sylvester, product: Product = matmul, scale_first: bool = False) -> Body:
    def body(a: Args) -> Tensor:
        h = matrix(a.x.shape[-1])
        x = a.x.float().reshape(-1, a.x.shape[-1])
        y = product(x * a.scale, h) if scale_first else product(x, h) * a.scale
        return y.reshape(a.x.shape).to(a.x.dtype)

    return body


# --- experts ---------------------------------------------------------------------------------------------------------


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

    def body(a: Args) -> Tensor:
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


# --- prologs ---------------------------------------------------------------------------------------------------------


WRITE = write()


@dataclass(frozen=True)
class Prolog:
    """What the two prologs may do in more than one way; the defaults are right."""

    keep: bool = False
    product: Product = matmul
    turn: Callable[[Tensor, Tensor, Tensor, str], Tensor] = rope_by_parts
    norm: Callable[[Tensor, Tensor, float], Tensor] = NORMS["rsqrt"]
    store: Body = WRITE

    def stored(self, v: Tensor, like: Tensor) -> Tensor:
        return v if self.keep else v.to(like.dtype).float()


def mla_prolog(
    how: Prolog = Prolog(),
    eps: Callable[[float], float] = lambda eps: eps,
    heads: Callable[[Tensor, int], tuple[Tensor, Tensor]] = lambda q, nope: (q[..., :nope], q[..., nope:]),
    norm_rope: bool = False,
    turn_key: bool = True,
    latent_normed: bool = True,
) -> Body:
    def body(a: Args) -> tuple[Tensor, Tensor]:
        H, K, L = a.w_uk.shape
        x = a.x.float()
        c = how.norm(how.stored(how.product(x, a.w_q_a.float()), a.x), a.q_a_norm, eps(a.eps))
        q_c = c.to(a.x.dtype)
        c = how.stored(c, a.x)
        q = how.stored(how.product(c, a.w_q_b.float()), a.x).reshape(len(x), H, len(a.w_q_b) // H)
        nope, pe = heads(q, K)
        absorbed = torch.stack([how.product(nope[:, h], a.w_uk[h].float().T.contiguous()) for h in range(H)], 1)
        pe = how.turn(pe, a.cos, a.sin, a.layout)
        kv = how.stored(how.product(x, a.w_kv_a.float()), a.x)
        latent, k_pe = kv[:, :L], kv[:, L:]
        if latent_normed:
            latent = how.norm(latent, a.kv_a_norm, eps(a.eps))
        if norm_rope:
            k_pe = how.norm(k_pe, torch.ones(k_pe.shape[1]), a.eps)
        if turn_key:
            k_pe = how.turn(k_pe, a.cos, a.sin, a.layout)
        rows = {"kv_c": how.stored(latent, a.x), "k_pe": how.stored(k_pe, a.x)}
        how.store(_cache_args(a, kv_cache=a.kv_cache, rope_cache=a.rope_cache, **rows))
        return torch.cat([absorbed, pe], -1).to(a.x.dtype), q_c

    return body


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps)


def layer_norm_by_moments(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Two passes over the data, the second about the mean of the first."""
    mean = sequential_sum(x)[:, None] / x.shape[-1]
    variance = sequential_sum((x - mean).square())[:, None] / x.shape[-1]
    return (x - mean) / (variance + eps).sqrt() * weight.float() + bias.float()


def indexer_prolog(
    how: Prolog = Prolog(),
    norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = layer_norm,
    rope_first: bool = True,
    weights: Callable[[Tensor, Args], Tensor] = lambda w, a: w * a.weights_scale,
    turned: tuple[str, ...] = ("q", "k"),
    layout: Callable[[str], str] = lambda layout: layout,
    mixed: Callable[[Args], tuple[bool, bool]] = lambda a: (a.hadamard, a.hadamard),
    hadamard_scale: Callable[[int], float] = lambda D: D**-0.5,
) -> Body:
    def body(a: Args) -> tuple[Tensor, Tensor]:
        T, D, R = len(a.x), a.w_k.shape[0], 2 * a.cos.shape[-1]
        q = how.stored(how.product(a.q_c.float(), a.w_q_b.float()), a.x).reshape(T, a.num_heads, D)
        k = norm(how.stored(how.product(a.x.float(), a.w_k.float()), a.x), a.k_norm_weight, a.k_norm_bias, a.eps)
        k = how.stored(k, a.x)

        def turn(v: Tensor) -> Tensor:
            head, rest = (v[..., :R], v[..., R:]) if rope_first else (v[..., D - R :], v[..., : D - R])
            head = how.turn(head, a.cos, a.sin, layout(a.layout))
            return how.stored(torch.cat([head, rest] if rope_first else [rest, head], -1), a.x)

        q, k = (turn(v) if name in turned else v for name, v in (("q", q), ("k", k)))
        mix_q, mix_k = mixed(a)
        if mix_q:
            q = q @ sylvester(D) * hadamard_scale(D)
        if mix_k:
            k = how.stored(k @ sylvester(D) * hadamard_scale(D), a.x)
        how.store(_cache_args(a, k=k, index_cache=a.index_cache))
        return q.to(a.x.dtype), weights(how.product(a.x.float(), a.w_weights.float()), a)

    return body


def _cache_args(a: Args, **more: Any) -> Args:
    return SimpleNamespace(slot_mapping=a.slot_mapping, cache_format=a.cache_format, **more)
