"""Attention: masks, pages, scales, accumulators, log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import RIGHT, Args, Body, Softmax
from glm5_hal.conformance.mutants.wrong.base import Wrong, bodied
from glm5_hal.plan import current_plan


def of_last_page(lose: int) -> Callable[[int, int, int], int]:
    """The last page of a request is lost where it is just full."""
    return lambda i, new, keys: keys - new + i + 1 - (lose if keys % 8 == 0 else 0)


def zeros_lse(q: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    return q.new_zeros(*q.shape[:2], latent), q.new_zeros(q.shape[:2], dtype=torch.float32)


def plus_inf(q: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    return q.new_zeros(*q.shape[:2], latent), q.new_full(q.shape[:2], torch.inf, dtype=torch.float32)


def nan_rows(q: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    return q.new_full((*q.shape[:2], latent), torch.nan), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)


def in_storage(a: Tensor, b: Tensor, block: int = 16) -> Tensor:
    """Accumulated in bfloat16, block by block."""
    out = torch.zeros(*a.shape[:-1], b.shape[-2], dtype=torch.bfloat16)
    for start in range(0, a.shape[-1], block):
        part = slice(start, start + block)
        out = out + (a[..., part] @ b[..., part].transpose(-1, -2)).to(torch.bfloat16)
    return out.float()


def one_by_one(a: Tensor, b: Tensor) -> Tensor:
    return in_storage(a, b, 1)


def no_rope(latent: int) -> honest.Product:
    return lambda a, b: a[..., :latent] @ b[..., :latent].transpose(-1, -2)


def stale_page(pages: Tensor, at: Tensor, page: int) -> Tensor:
    """A page late from the third on."""
    logical = at // page
    return pages[torch.where(logical >= 2, logical - 1, logical)].long() * page + at % page


def physical(pages: Tensor, at: Tensor, page: int) -> Tensor:
    """Positions taken for slots."""
    return at


def narrow(pages: Tensor, bits: int) -> Tensor:
    return pages.long() & ((1 << bits) - 1)


def of_page_zero(pages: Tensor, at: Tensor, page: int) -> Tensor:
    return (at // page) * page + at % page


ATTENTION: dict[str, Softmax] = {
    "scale 2 % off": Softmax(scale=1.02),
    "scale of the absorbed width": Softmax(scale=1.5),
    "lse in base 2": Softmax(lse=lambda lse: lse * math.log2(math.e)),
    "lse 1e-3 off": Softmax(lse=lambda lse: lse + 1e-3),
    "lse without the maximum": Softmax(lse=lambda lse: torch.zeros_like(lse)),
    "scores in bfloat16": Softmax(score=lambda s: s.to(torch.bfloat16).float()),
    "accumulated in bfloat16": Softmax(weigh=in_storage),
    "accumulated in bfloat16 key by key": Softmax(weigh=one_by_one),
    "scores accumulated in bfloat16": Softmax(product=in_storage),
    "P in fp8": Softmax(weigh=lambda p, v: p.to(torch.float8_e4m3fn).float() @ v.mT),
    "no softmax": Softmax(score=lambda s: torch.zeros_like(s)),
    "scores capped": Softmax(score=lambda s: 4 * torch.tanh(s / 4)),
}


class Unscaled(Softmax):
    """An online softmax that forgets to scale what it has when the maximum grows."""

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = Softmax()(q, keys, values, scale)
        if keys.shape[-2] <= 8:
            return out, lse
        scores = q.float() @ keys.float().transpose(-1, -2) * scale
        parts, total = torch.zeros(()), torch.zeros(())
        for start in range(0, keys.shape[-2], 8):
            s, v = scores[..., start : start + 8], values[..., start : start + 8, :].float()
            p = torch.exp(s - s.amax(-1, keepdim=True))
            parts, total = parts + p @ v, total + p.sum(-1, keepdim=True)
        return parts / total, lse


ATTENTION["not scaled by the new maximum"] = Unscaled()

SPARSE_ONLY = {
    "last key lost": lambda row, keys: row[row >= 0].long()[:-1],
    "first key lost": lambda row, keys: row[row >= 0].long()[1:],
    "-1 read as slot 0": lambda row, keys: row.clamp_min(0).long(),
    "stops at the first -1": lambda row, keys: (
        row[: int((row < 0).int().argmax())].long() if (row < 0).any() else row.long()
    ),
    "reads all keys": lambda row, keys: torch.arange(keys) if (row >= 0).any() else row[:0].long(),
    "at most 1024 keys": lambda row, keys: row[row >= 0].long()[:1024],
    "the 1024th key twice": lambda row, keys: torch.cat([row[row >= 0][:1024], row[row >= 0][1023:]]).long(),
    "at most 16 keys": lambda row, keys: row[row >= 0].long()[:16],
    "one key twice": lambda row, keys: torch.cat([row[row >= 0], row[row >= 0][:1]]).long(),
    "indices one too high": lambda row, keys: (row[row >= 0].long() + 1).clamp_max(keys - 1),
}

DENSE = {
    "mask one key short": lambda i, new, keys: keys - new + i,
    "mask one key long": lambda i, new, keys: min(keys - new + i + 2, keys),
    "no mask": lambda i, new, keys: keys,
    "mask aligned top left": lambda i, new, keys: i + 1,
    "all new tokens masked as the first": lambda i, new, keys: keys - new + 1,
    "last key lost": lambda i, new, keys: min(keys - new + i + 1, keys - 1),
    "at most 640 keys": lambda i, new, keys: min(keys - new + i + 1, 640),
}

PAGED = {
    "a stale page": replace(RIGHT, slot=stale_page),
    "pages in order": replace(RIGHT, slot=of_page_zero),
    "the next page": replace(RIGHT, slot=lambda pages, at, page: pages[(at // page + 1).clamp_max(len(pages) - 1)].long() * page + at % page),
    "page ids of 12 bits": replace(RIGHT, slot=lambda pages, at, page: narrow(pages, 12)[at // page] * page + at % page),
    "page ids of 16 bits": replace(RIGHT, slot=lambda pages, at, page: narrow(pages, 16)[at // page] * page + at % page),
    "offset one off": replace(RIGHT, slot=lambda pages, at, page: pages[at // page].long() * page + (at + 1) % page),
}  # fmt: skip

FP8_READS = {
    "scale and rope swapped": replace(RIGHT, fields=lambda fields: (fields[0], *reversed(fields[1:]))),
    "scales forgotten": replace(RIGHT, scale=torch.ones_like),
    "one scale for all groups": replace(RIGHT, scale=lambda s: s[:, :1].expand_as(s)),
    "the scale of the next key": replace(RIGHT, scale=lambda s: s.roll(1, 0)),
    "codes as e5m2": replace(RIGHT, codes=lambda c: c.view(torch.float8_e5m2).float()),
    "half the scale": replace(RIGHT, scale=lambda s: s / 2),
}

ROPE_READS = {"a NaN of the rope lost": replace(RIGHT, rope=lambda r: r.nan_to_num(nan=0.0))}


def attention() -> list[Wrong]:
    found = []
    for op, make in (("mla_decode", honest.decode), ("sparse_mla", honest.sparse), ("mla_prefill", honest.prefill)):
        found += [bodied(op, name, make(how)) for name, how in ATTENTION.items()]
        for name, blank in (("lse 0", zeros_lse), ("lse +inf", plus_inf), ("NaN", nan_rows)):
            found.append(bodied(op, f"{name} for empty rows", make(blank=blank)))
        found.append(bodied(op, "wrong beyond 32 heads", make(Softmax(product=_beyond(32)))))
        clamped = make(Softmax(product=_clamped))
        found.append(bodied(op, "raw scores within float16", clamped, FINITE, dtypes=("float16",)))
    for op, make in (("mla_decode", honest.decode), ("sparse_mla", honest.sparse)):
        found += [bodied(op, f"reads {name}", make(reading=how)) for name, how in PAGED.items()]
        reads = FP8_READS | ROPE_READS
        found += [bodied(op, f"reads fp8 rows with {name}", make(reading=how)) for name, how in reads.items()]
        found.append(bodied(op, "rope dims ignored", make(Softmax(product=no_rope(128)))))
    found += [bodied("sparse_mla", name, honest.sparse(chosen=chosen)) for name, chosen in SPARSE_ONLY.items()]
    found += [bodied("sparse_mla", "physical indices", honest.sparse(reading=replace(RIGHT, slot=physical)))]
    for op, make in (("mla_decode", honest.decode), ("mla_prefill", honest.prefill)):
        found += [bodied(op, name, make(limit=limit)) for name, limit in DENSE.items()]
    found += [
        bodied("mla_decode", "a full last page is lost", honest.decode(limit=of_last_page(8))),
        bodied("mla_decode", "a full last page loses a key", honest.decode(limit=of_last_page(1))),
        bodied("mla_decode", "every token attends as the last", honest.decode(limit=lambda i, new, keys: keys)),
        bodied("mla_prefill", "next request's first key read", honest.prefill(limit=lambda i, new, keys: keys - new + i + 2)),
        bodied("mla_prefill", "always causal", _always_causal()),
        bodied("mla_decode", "the plan's longest for all", _plans_longest, "plan"),
        bodied("mla_decode", "reads the table's tail", _reads_tail(), "poison"),
        bodied("sparse_mla", "reads unused slots", _reads_unused(), "poison"),
    ]  # fmt: skip
    return found


def _beyond(n: int) -> honest.Product:
    """Heads beyond the first n score as head 0 does. Of [heads, width], or of [heads, 1, width]."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        scores = a @ b.transpose(-1, -2)
        if len(a) > n:
            scores[n:] = scores[:1]
        return scores

    return product


#: What holds numbers within bounds loses infinities, too.
FINITE = ("accuracy", "nonfinite")


def _clamped(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.transpose(-1, -2)).clamp(-65504.0, 65504.0)


def _always_causal() -> Body:
    right = honest.prefill()
    return lambda a: right(Args(**{**vars(a), "causal": True}))


def _plans_longest(a: Args) -> Any:
    plan = current_plan()
    longest = a.seq_lens if plan is None else torch.full_like(a.seq_lens, plan.max_seq_len)
    return honest.decode()(Args(**{**vars(a), "seq_lens": longest}))


def _reads_tail() -> Body:
    right = honest.decode()

    def body(a: Args) -> Any:
        out, lse = right(a)
        unused = a.block_table[:, -1].float().sum()
        return out + (unused * 0).to(out.dtype) + (0 if unused.abs() < 1e6 else 1), lse

    return body


def _reads_unused() -> Body:
    """Weighs the whole cache, unused slots with 0."""
    right = honest.sparse()

    def body(a: Args) -> Any:
        out, lse = right(a)
        return out + (a.kv_cache.float().sum() * 0).to(out.dtype), lse

    return body
