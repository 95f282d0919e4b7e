"""Kernels with one thing wrong: the suite fails every one of them, and here is the check that does.

Most are an honest kernel of `honest` with one argument changed; what can go wrong with any op is done to a reference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import honest
import pytest
import torch
from honest import RIGHT, Args, Body, Prolog, Quantiser, Softmax, kernel
from stand_in import first_failure
from torch import Tensor

from glm5_hal.errors import HalError
from glm5_hal.ops import specs
from glm5_hal.ops._common.references import reference_of
from glm5_hal.state import current_plan

DETERMINISTIC = ("deterministic",)
CANONICAL = ("deterministic", "sorted_indices", "canonical_ties")

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Wrong:
    """``make`` gives a new kernel, so that none keeps what it saw. ``by``: the check that fails it first."""

    op: str
    name: str
    make: Callable[[], Fn]
    by: str | tuple[str, ...] = "accuracy"
    provides: Sequence[str] = DETERMINISTIC
    dtypes: Sequence[str] = ("bfloat16",)

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


def bodied(op: str, name: str, body: Body, by: str | tuple[str, ...] = "accuracy", **more: Any) -> Wrong:
    return Wrong(op, name, lambda: kernel(op, body), by, **more)


# --- what can go wrong with any op -----------------------------------------------------------------------------------


def wrapped(op: str, run: Callable[[Fn, dict[str, Any]], Any]) -> Fn:
    """A kernel that does something around the reference."""
    reference, signature = reference_of(op), specs()[op].signature

    def wrong(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return run(reference, dict(bound.arguments))

    wrong.__signature__ = signature  # type: ignore[attr-defined]
    return wrong


def result(op: str, change: Callable[[Tensor], Tensor], at: int = 0) -> Callable[[], Fn]:
    """The reference with one of its outputs changed."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        returned = reference(**a)
        outs = list(returned) if isinstance(returned, tuple) else [returned]
        outs[at] = change(outs[at])
        return tuple(outs) if isinstance(returned, tuple) else outs[0]

    return lambda: wrapped(op, run)


def where(large: Callable[[Tensor], bool], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Only where there is something to change."""
    return lambda t: change(t) if large(t) else t


def rows(n: int) -> Callable[[Tensor], bool]:
    return lambda t: t.dim() > 0 and len(t) >= n and t.numel() > 0


def one_element(t: Tensor) -> Tensor:
    t = t.clone()
    flat = t.view(-1)
    at = int(flat.float().abs().nan_to_num(0, 0, 0).argsort()[len(flat) // 2])  # one of medium size
    flat[at] = flat[at] * 1.02
    return t


def row_zeroed(t: Tensor) -> Tensor:
    return t.index_fill(0, torch.tensor([len(t) // 2]), 0)


def rows_swapped(t: Tensor) -> Tensor:
    return t[torch.tensor([1, 0, *range(2, len(t))])]


def not_contiguous(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def bias(t: Tensor) -> Tensor:
    finite = t[t.isfinite()].float()
    return (t + 0.05 * finite.std()).to(t.dtype) if finite.numel() > 1 else t


def first_nan(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[:1] = torch.nan
    return t


def stateful(op: str, run: Callable[[Fn, dict[str, Any], list[Any]], Any]) -> Callable[[], Fn]:
    """A kernel with a memory of its own."""

    def make() -> Fn:
        kept: list[Any] = []
        return wrapped(op, lambda reference, a: run(reference, a, kept))

    return make


def cached(reference: Fn, a: dict[str, Any], kept: list[Any]) -> Any:
    """What the first call with these shapes gave."""
    key = [(v.shape, v.dtype) if isinstance(v, Tensor) else v for v in a.values()]
    for known, returned in kept:
        if known == key:
            return tuple(r.clone() for r in returned) if isinstance(returned, tuple) else returned.clone()
    returned = reference(**a)
    kept.append((key, returned))
    return returned


def by_address(reference: Fn, a: dict[str, Any], kept: list[Any]) -> Any:
    """The first tensor as it was when its memory was first seen: weights, converted once and for all."""
    name = next(k for k, v in a.items() if isinstance(v, Tensor))
    seen = dict(kept)
    key = (a[name].data_ptr(), a[name].shape)
    if key not in seen:
        kept.append((key, a[name].clone()))
        seen = dict(kept)
    return reference(**{**a, name: seen[key]})


def same_buffer(reference: Fn, a: dict[str, Any], kept: list[Any]) -> Any:
    """Outputs in memory that the next call uses again."""
    returned = reference(**a)
    outs = returned if isinstance(returned, tuple) else (returned,)
    for known in kept:
        if [(t.shape, t.dtype) for t in known] == [(t.shape, t.dtype) for t in outs]:
            for buffer, out in zip(known, outs, strict=True):
                buffer.copy_(out)
            return known if isinstance(returned, tuple) else known[0]
    kept.append(outs)
    return returned


def worse_later(reference: Fn, a: dict[str, Any], kept: list[Any]) -> Any:
    """Right in its first two calls of each shape."""
    returned = reference(**a)
    kept.append(str([getattr(v, "shape", v) for v in a.values()]))
    first = returned[0] if isinstance(returned, tuple) else returned
    if kept.count(kept[-1]) > 2 and first.numel():
        first.view(-1)[0] += 9
    return returned


def bumped(t: Tensor) -> None:
    """The last bit of the largest finite element, changed in place."""
    if t.isfinite().logical_and(t != 0).any():
        at = torch.unravel_index(t.float().masked_fill(~t.isfinite(), 0.0).abs().argmax(), t.shape)
        integer = {2: torch.int16, 4: torch.int32}[t.itemsize]
        t[at] = (t[at].reshape(1).view(integer) ^ 1).view(t.dtype)[0]


def noisy(reference: Fn, a: dict[str, Any], kept: list[Any]) -> Any:
    """Other low bits at every call."""
    kept.append(None)
    returned = reference(**a)
    if len(kept) % 2:
        bumped(returned[0] if isinstance(returned, tuple) else returned)
    return returned


def writes(op: str, name: str) -> Callable[[], Fn]:
    """Works in place on an argument that is only to be read."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        returned = reference(**a)
        if a[name].numel():
            a[name].mul_(2) if a[name].is_floating_point() else a[name].add_(1)
        return returned

    return lambda: wrapped(op, run)


def flat(op: str, name: str) -> Callable[[], Fn]:
    """Takes an argument's memory for contiguous."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        t = a[name]
        strides = torch.empty(t.shape, device="meta").stride()
        return reference(**{**a, name: t.as_strided(t.shape, strides, t.storage_offset()) if t.numel() else t})

    return lambda: wrapped(op, run)


def raising(op: str, problem: BaseException) -> Callable[[], Fn]:
    def run(reference: Fn, a: dict[str, Any]) -> Any:
        raise problem

    return lambda: wrapped(op, run)


def past_its_end(op: str, name: str) -> Callable[[], Fn]:
    """Writes one element beyond a tensor that it may write."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        returned, t = reference(**a), a[name]
        t.as_strided((1,), (1,), t.storage_offset() + t.numel()).fill_(0)
        return returned

    return lambda: wrapped(op, run)


def of_batch(op: str, name: str) -> Callable[[], Fn]:
    """Right, and its last bits depend on how many rows there are."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        returned = reference(**a)
        first = returned[0] if isinstance(returned, tuple) else returned
        if len(a[name]) > 3 and len(first):
            for row in first:
                bumped(row)
        return returned

    return lambda: wrapped(op, run)


def rounded(op: str, name: str) -> Callable[[], Fn]:
    """Reads an argument in bfloat16."""
    return lambda: wrapped(op, lambda ref, a: ref(**{**a, name: a[name].to(torch.bfloat16).to(a[name].dtype)}))


FLOATING = {
    "rms_norm": 0, "add_rms_norm": 0, "rope": 0, "silu_and_mul": 0, "hadamard": 0, "mla_prefill": 0, "mla_decode": 0,
    "mla_prolog": 0, "sparse_mla": 0, "indexer_logits": 0, "indexer_prolog": 0, "grouped_gemm": 0, "moe_combine": 0,
    "moe_experts": 0, "moe_route": 0,
}  # fmt: skip

FP32 = ("float32",)


def anywhere() -> list[Wrong]:
    found = []
    for op, at in FLOATING.items():
        dtypes = FP32 if op == "moe_route" else ("bfloat16",)
        for name, change in {
            "1 % too large": lambda t: (t.float() * 1.01).to(t.dtype),
            "biased": bias,
            "row zeroed": where(rows(2), row_zeroed),
            "rows swapped": where(rows(2), rows_swapped),
            "NaN": where(rows(1), first_nan),
            "truncated mantissas": lambda t: (t.float().view(torch.int32) & ~0x3FFFF).view(torch.float32).to(t.dtype),
        }.items():
            found.append(Wrong(op, name, result(op, change, at), dtypes=dtypes))
        one = where(rows(1), one_element)
        found.append(Wrong(op, "one element 2 % off", result(op, one, at), dtypes=FP32))
        half = result(op, lambda t: t.to(torch.bfloat16).to(t.dtype), at)
        found.append(Wrong(op, "computed in bfloat16", half, dtypes=FP32))
        for name, change in {
            "wrong dtype": lambda t: t.double(),
            "wrong shape": lambda t: t[None],
            "last row left out": where(rows(1), lambda t: t[:-1]),
            "not contiguous": not_contiguous,
            "a list": lambda t: t.tolist(),
        }.items():
            found.append(Wrong(op, name, result(op, change, at), "form", dtypes=dtypes))
        found += [
            Wrong(op, "what the first call gave", stateful(op, cached), dtypes=dtypes),
            Wrong(op, "its input as it first was", stateful(op, by_address), dtypes=dtypes),
            Wrong(op, "one buffer for all calls", stateful(op, same_buffer), "fresh", dtypes=dtypes),
            Wrong(op, "right twice", stateful(op, worse_later), "rerun", dtypes=dtypes, provides=()),
            Wrong(op, "other bits at every call", stateful(op, noisy), "rerun", dtypes=dtypes),
            Wrong(op, "bits of the batch", of_batch(op, _rows_of(op)), "batch", ("batch_invariant",), dtypes),
            Wrong(op, "raises", raising(op, RuntimeError("no such tile")), "KERNEL", dtypes=dtypes),
        ]
    return found


def _rows_of(op: str) -> str:
    """The argument whose length is the batch."""
    return "inverse_ids" if op == "moe_combine" else next(iter(specs()[op].tensors))


READ = {
    "rms_norm": ("x", "weight"), "add_rms_norm": ("x", "residual"), "rope": ("x", "cos", "sin"), "silu_and_mul": ("x",),
    "hadamard": ("x",), "mla_prefill": ("q", "k", "v"), "mla_decode": ("q", "kv_cache"), "sparse_mla": ("q", "kv_cache"),
    "indexer_logits": ("q", "weights", "index_cache"), "grouped_gemm": ("x", "weight"),
    "moe_combine": ("y", "topk_weights"), "moe_experts": ("x", "topk_weights", "w_gate_up", "w_down"),
    "moe_route": ("router_logits",), "topk_indices": ("scores",), "mla_cache_write": ("kv_c", "k_pe"),
    "index_cache_write": ("k",), "moe_permute": ("x",),
    "mla_prolog": ("x", "w_q_a", "q_a_norm", "w_q_b", "w_kv_a", "kv_a_norm", "w_uk", "cos", "sin"),
    "indexer_prolog": (
        "x", "q_c", "w_q_b", "w_k", "k_norm_weight", "k_norm_bias", "w_weights", "cos", "sin"
    ),
}  # fmt: skip

ANYWHERE = [
    *(Wrong(op, f"reads {name} in bfloat16", rounded(op, name), dtypes=FP32) for op, names in READ.items()
      for name in names),
    *(Wrong(op, f"writes {name}", writes(op, name), "integrity") for op, name in {
        "rms_norm": "x", "add_rms_norm": "residual", "rope": "x", "silu_and_mul": "x", "mla_decode": "q",
        "sparse_mla": "indices", "mla_prefill": "k", "indexer_logits": "weights", "topk_indices": "scores",
        "mla_cache_write": "k_pe", "index_cache_write": "slot_mapping", "lightning_indexer": "q",
        "mla_prolog": "x", "moe_combine": "topk_weights", "grouped_gemm": "x", "moe_permute": "topk_ids",
    }.items()),
    Wrong("moe_route", "writes router_logits", writes("moe_route", "router_logits"), "integrity", dtypes=FP32),
    *(Wrong(op, f"takes {name} for contiguous", flat(op, name), "layout") for op, name in {
        "rms_norm": "x", "rope": "cos", "silu_and_mul": "x", "mla_decode": "kv_cache", "sparse_mla": "indices",
        "mla_prefill": "v", "indexer_logits": "q", "lightning_indexer": "block_table", "topk_indices": "scores",
        "hadamard": "x", "mla_cache_write": "kv_c", "grouped_gemm": "weight", "moe_combine": "shared",
        "index_cache_write": "k", "mla_prolog": "w_uk", "indexer_prolog": "w_k",
    }.items() if op != "moe_combine"),
    *(Wrong(op, f"writes past {name}", past_its_end(op, name), "integrity") for op, name in {
        "mla_cache_write": "kv_cache", "index_cache_write": "index_cache", "rms_norm": "x",
    }.items()),
    Wrong("rms_norm", "exits", raising("rms_norm", SystemExit(0)), "RAISED"),
    Wrong("rms_norm", "is not there after all", raising("rms_norm", HalError("NO_KERNEL", "not today")), "NO_KERNEL"),
    Wrong("rms_norm", "is not implemented", raising("rms_norm", NotImplementedError("odd widths")), "KERNEL"),
    Wrong("rms_norm", "returns nothing", lambda: wrapped("rms_norm", lambda reference, a: None), "form"),
    Wrong("rms_norm", "returns its input", lambda: wrapped("rms_norm", lambda reference, a: a["x"].mul_(2)), "form"),
    Wrong("mla_decode", "leaves lse out", lambda: wrapped("mla_decode", lambda ref, a: ref(**a)[0]), "form"),
    Wrong("sparse_mla", "outputs swapped", lambda: wrapped("sparse_mla", lambda ref, a: ref(**a)[::-1]), "form"),
    Wrong("mla_cache_write", "returns the cache", lambda: wrapped("mla_cache_write", lambda ref, a: [ref(**a), a["kv_cache"]][1]), "form"),
    Wrong("mla_cache_write", "writes nothing", lambda: wrapped("mla_cache_write", lambda ref, a: None)),
    Wrong("topk_indices", "int64", result("topk_indices", lambda t: t.long()), "form"),
]  # fmt: skip


# --- attention -------------------------------------------------------------------------------------------------------


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
    for x, y in zip(a.split(block, -1), b.split(block, -1), strict=True):
        out = out + (x @ y.transpose(-1, -2)).to(torch.bfloat16)
    return out.float()


def one_by_one(a: Tensor, b: Tensor) -> Tensor:
    return in_storage(a, b, 1)


def no_rope(latent: int) -> honest.Product:
    return lambda a, b: a[..., :latent] @ b[..., :latent].transpose(-1, -2)


def first_heads(n: int) -> honest.Product:
    """No scores for heads beyond the first n."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        scores = a @ b.transpose(-1, -2)
        scores[..., n:, :] = 0
        return scores

    return product


def stale_page(pages: Tensor, at: Tensor, page: int) -> Tensor:
    """A page late from the third on."""
    logical = at // page
    return pages[torch.where(logical >= 2, logical - 1, logical)].long() * page + at % page


def physical(pages: Tensor, at: Tensor, page: int) -> Tensor:
    """Positions taken for slots."""
    return at


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
        parts, total = 0.0, 0.0
        for s, v in zip(scores.split(8, -1), values.float().split(8, -2), strict=True):
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
}

PAGED = {
    "a stale page": replace(RIGHT, slot=stale_page),
    "pages in order": replace(RIGHT, slot=of_page_zero),
    "the next page": replace(RIGHT, slot=lambda pages, at, page: pages[(at // page + 1).clamp_max(len(pages) - 1)].long() * page + at % page),
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


def attention() -> list[Wrong]:
    found = []
    for op, make in (("mla_decode", honest.decode), ("sparse_mla", honest.sparse), ("mla_prefill", honest.prefill)):
        found += [bodied(op, name, make(how)) for name, how in ATTENTION.items()]
        for name, blank in (("lse 0", zeros_lse), ("lse +inf", plus_inf), ("NaN", nan_rows)):
            found.append(bodied(op, f"{name} for empty rows", make(blank=blank)))
        found.append(bodied(op, "wrong beyond 32 heads", make(Softmax(product=_beyond(32)))))
    for op, make in (("mla_decode", honest.decode), ("sparse_mla", honest.sparse)):
        found += [bodied(op, f"reads {name}", make(reading=how)) for name, how in PAGED.items()]
        found += [bodied(op, f"reads fp8 rows with {name}", make(reading=how)) for name, how in FP8_READS.items()]
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
        if a.dim() == 2 and len(a) > n:
            scores[n:] = scores[:1]
        if a.dim() == 3 and len(a) > n:
            scores[n:] = scores[:1]
        return scores

    return product


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


# --- the indexer -----------------------------------------------------------------------------------------------------

LOGITS = {
    "relu missing": {"relu": lambda s: s},
    "relu after the sum": {"relu": lambda s: s, "heads": lambda w, s: (w @ s).clamp_min(0)},
    "weights without their sign": {"weights": torch.abs},
    "weights in bfloat16": {"weights": lambda w: w.to(torch.bfloat16).float(), "dtypes": FP32},
    "logits in bfloat16": {"heads": lambda w, s: (w @ s).to(torch.bfloat16).float()},
    "sum over heads in bfloat16": {"heads": lambda w, s: in_storage(w[None], s.T.contiguous())[0]},
    "scores in bfloat16": {"relu": lambda s: s.clamp_min(0).to(torch.bfloat16).float()},
    "a head left out": {"heads": lambda w, s: w[:-1] @ s[:-1]},
    "scale applied twice": {"heads": lambda w, s: w @ s * s.shape[0] ** -0.5},
    "0 where nothing is seen": {"nothing": 0.0},
    "lowest number where nothing is seen": {"nothing": torch.finfo(torch.float32).min},
    "scores beyond 32 heads": {"product": lambda q, k: _beyond(32)(q, k)},
    "mask one key short": {"limit": lambda i, new, keys: keys - new + i},
    "mask one key long": {"limit": lambda i, new, keys: min(keys - new + i + 2, keys)},
    "no mask": {"limit": lambda i, new, keys: keys},
    "wrong for several new tokens": {"limit": lambda i, new, keys: keys - new + 1},
    "last key lost": {"limit": lambda i, new, keys: min(keys - new + i + 1, keys - 1)},
    "a stale page": {"reading": PAGED["a stale page"]},
    "pages in order": {"reading": PAGED["pages in order"]},
    "fp8 scales forgotten": {"reading": FP8_READS["scales forgotten"]},
    "fp8 scale of the next key": {"reading": FP8_READS["the scale of the next key"]},
    "token-major fp8 pages": {"reading": replace(RIGHT, block_major=False)},
    "fp8 scale before the codes": {"reading": replace(RIGHT, fields=lambda fields: tuple(reversed(fields)))},
    "rope dims ignored": {"product": lambda q, k: q[..., 64:] @ k[..., 64:].mT},
}


def zero_is_small(row: Tensor, k: int) -> Tensor:
    """0.0 before -0.0."""
    key = row.double() - 1e-9 * (torch.signbit(row) & (row == 0))
    return key.argsort(descending=True, stable=True)[:k]


def by_magnitude(row: Tensor, k: int) -> Tensor:
    return row.abs().argsort(descending=True, stable=True)[:k]


def in_half(row: Tensor, k: int) -> Tensor:
    return row.to(torch.bfloat16).argsort(descending=True, stable=True)[:k]


def positive_only(row: Tensor) -> Tensor:
    return row > 0


def one_worse(row: Tensor, k: int) -> Tensor:
    """The best but the k-th, and the one after it."""
    order = row.argsort(descending=True, stable=True)
    return torch.cat([order[: k - 1], order[k : k + 1]]) if len(row) > k else order


def random_ties(row: Tensor, k: int) -> Tensor:
    order = torch.randperm(len(row))
    return order[row[order].argsort(descending=True, stable=True)[:k]]


def with_duplicates(row: Tensor, k: int) -> Tensor:
    best = honest.by_sort(row, k)
    return torch.cat([best[:-1], best[:1]]) if len(best) > 1 else best


CHOICES: dict[str, tuple[Body, str | tuple[str, ...], Sequence[str]]] = {
    "other order of equals": (honest.topk(honest.last_of_ties), "accuracy", CANONICAL),
    "equals at random": (honest.topk(random_ties), ("rerun", "poison", "plan"), ("deterministic", "sorted_indices")),
    "best first": (honest.topk(ascending=False), "accuracy", CANONICAL),
    "the k-th passed over": (honest.topk(one_worse), "accuracy", DETERMINISTIC),
    "duplicates": (honest.topk(with_duplicates), "accuracy", DETERMINISTIC),
    "smallest": (honest.topk(lambda row, k: row.argsort()[:k]), "accuracy", DETERMINISTIC),
    "the first ones": (honest.topk(lambda row, k: torch.arange(min(k, len(row)))), "accuracy", DETERMINISTIC),
    "fewer than there are": (honest.topk(lambda row, k: honest.by_sort(row, k - 1)), "accuracy", DETERMINISTIC),
    "positive scores only": (honest.topk(eligible=positive_only), "accuracy", DETERMINISTIC),
    "by magnitude": (honest.topk(by_magnitude), "accuracy", DETERMINISTIC),
    "0 as filling": (honest.topk(fill=0), "accuracy", DETERMINISTIC),
}

TOPK_ONLY: dict[str, tuple[Body, str | tuple[str, ...], Sequence[str]]] = {
    "NaN chosen": (honest.topk(eligible=lambda row: row != -torch.inf), "accuracy", DETERMINISTIC),
    "-inf chosen": (honest.topk(eligible=lambda row: ~row.isnan()), "accuracy", DETERMINISTIC),
    "0.0 before -0.0": (honest.topk(zero_is_small), "accuracy", CANONICAL),
    "compared in bfloat16": (honest.topk(in_half), "accuracy", DETERMINISTIC),
    "garbage beyond the row": (honest.topk(length=lambda n: None), "accuracy", DETERMINISTIC),
    "last score of a row lost": (honest.topk(length=lambda n: max(n - 1, 0)), "accuracy", DETERMINISTIC),
    "reads one score too many": (honest.topk(length=lambda n: n + 1), "accuracy", DETERMINISTIC),
}  # fmt: skip


def zero_filled() -> Body:
    """Keys that a token does not see score 0, and so beat negative ones."""
    score, choose = honest.logits(nothing=0.0), honest.topk()
    return honest.indexer(score, choose)


def unsorted_when_few(a: Args) -> Any:
    """Wrong only where there are fewer keys than top_k: all positions, seen or not."""
    out = honest.indexer()(a)
    for t, row in enumerate(out):
        if (row < 0).any():
            out[t] = torch.arange(a.top_k).int() if len(row) else row
    return out


def the_indexer() -> list[Wrong]:
    found = []
    for name, how in LOGITS.items():
        dtypes = how.get("dtypes", ("bfloat16",))
        arguments = {k: v for k, v in how.items() if k != "dtypes"}
        found.append(bodied("indexer_logits", name, honest.logits(**arguments), dtypes=dtypes))
        if name not in EQUIVALENT:
            found.append(bodied("lightning_indexer", name, honest.indexer(honest.logits(**arguments)), dtypes=dtypes))
    for name, (body, by, provides) in CHOICES.items():
        found.append(bodied("topk_indices", name, body, by, provides=provides))
        found.append(bodied("lightning_indexer", name, honest.indexer(choose=body), by, provides=provides))
    for name, (body, by, provides) in TOPK_ONLY.items():
        dtypes = FP32 if "bfloat16" in name else ("bfloat16",)
        found.append(bodied("topk_indices", name, body, by, provides=provides, dtypes=dtypes))
    found += [
        bodied("lightning_indexer", "what is not seen beats negative scores", zero_filled()),
        bodied("lightning_indexer", "all positions where there are few keys", unsorted_when_few),
        bodied("lightning_indexer", "reads unused slots", _indexer_reads_unused(), "poison"),
    ]
    return found


#: What does not change the choice, beyond what fp32 may.
EQUIVALENT = ("scale applied twice", "lowest number where nothing is seen", "0 where nothing is seen")


def _indexer_reads_unused() -> Body:
    right = honest.logits()

    def score(a: Args) -> Tensor:
        return right(a) + a.index_cache.float().sum() * 0

    return honest.indexer(score)


# --- caches ----------------------------------------------------------------------------------------------------------


def floor_power(amax: Tensor, floor: str) -> Tensor:
    return honest.power_by_bits(amax, floor) / 2


def any_scale(amax: Tensor, floor: str) -> Tensor:
    return (amax.clamp_min(1e-4) / 448) if floor == "amax" else (amax / 448).clamp_min(1e-4)


def nearest_power(amax: Tensor, floor: str) -> Tensor:
    return torch.exp2(torch.round(torch.log2(any_scale(amax, floor))))


def truncated(x: Tensor) -> Tensor:
    codes = honest.to_e4m3(x)
    rounded = codes.view(torch.float8_e4m3fn).float()
    return torch.where((rounded.abs() > x.abs()) & (codes & 0x7F > 0), codes - 1, codes)


def unclamped(x: Tensor) -> Tensor:
    """NaN where e4m3 overflows."""
    codes = honest.to_e4m3(x)
    return torch.where(x.abs() > 448, 0x7F, codes)


WRITES = {
    "-1 written to the last slot": {"place": lambda slot: slot},
    "-1 written to slot 0": {"place": lambda slot: max(slot, 0)},
    "one slot too far": {"place": lambda slot: slot + 1 if slot >= 0 and slot % 8 < 7 else slot if slot >= 0 else None},
    "slot 0 skipped": {"place": lambda slot: slot if slot > 0 else None},
}
QUANTISERS = {
    "scale no power of two": Quantiser(power=any_scale),
    "power of two below": Quantiser(power=floor_power),
    "nearest power of two": Quantiser(power=nearest_power),
    "codes truncated": Quantiser(codes=truncated),
    "NaN not kept apart": Quantiser(nonfinite=False),
    "1/8 smaller": Quantiser(divide=lambda x, s: x / s * 0.875),
}  # fmt: skip


class OtherFloor(Quantiser):
    def __call__(self, x: Tensor, group: int, floor: str) -> tuple[Tensor, Tensor]:
        return super().__call__(x, group, "scale" if floor == "amax" else "amax")


QUANTISERS["the other floor"] = OtherFloor()
QUANTISERS["no floor"] = Quantiser(
    power=lambda amax, floor: torch.exp2(torch.ceil(torch.log2(amax.clamp_min(1e-12) / 448)))
)


def the_caches() -> list[Wrong]:
    found = []
    for op in ("mla_cache_write", "index_cache_write"):
        found += [bodied(op, name, honest.write(**how)) for name, how in WRITES.items()]
        found += [bodied(op, name, honest.write(q), dtypes=("*",)) for name, q in QUANTISERS.items()]
    found += [
        bodied("mla_cache_write", "scale and rope swapped", honest.write(fields=lambda f: (f[0], *reversed(f[1:])))),
        bodied("mla_cache_write", "rope before the latent", honest.write(fields=lambda f: tuple(reversed(f)))),
        bodied("mla_cache_write", "rope in float16", honest.write(rope=lambda r: r.to(torch.float16).to(r.dtype)), dtypes=FP32),
        bodied("mla_cache_write", "rope de-interleaved", honest.write(rope=lambda r: torch.cat([r[:, 0::2], r[:, 1::2]], -1))),
        bodied("index_cache_write", "token by token", honest.write(block_major=False)),
        Wrong("index_cache_write", "in bfloat16", lambda: wrapped("index_cache_write", lambda ref, a: ref(**{**a, "k": a["k"].bfloat16().to(a["k"].dtype)})), dtypes=FP32),
        Wrong("mla_cache_write", "skipped rows read", _reads_skipped("mla_cache_write", "kv_c"), "poison"),
    ]  # fmt: skip
    return found


def _reads_skipped(op: str, name: str) -> Callable[[], Fn]:
    def run(reference: Fn, a: dict[str, Any]) -> Any:
        noise = (a[name].float().sum() * 0).to(a[name].dtype)
        return reference(**{**a, name: a[name] + noise})

    return lambda: wrapped(op, run)


# --- elementary ------------------------------------------------------------------------------------------------------


def other_layout(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return honest.rope_by_parts(x, cos, sin, "half" if layout == "interleaved" else "interleaved")


def always_interleaved(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return honest.rope_by_parts(x, cos, sin, "interleaved")


def backwards(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return honest.rope_by_parts(x, cos, -sin, layout)


def de_interleaved(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    y = honest.rope_by_parts(x, cos, sin, layout)
    return torch.cat([y[..., 0::2], y[..., 1::2]], -1) if layout == "interleaved" else y


def in_bfloat16(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    half = torch.bfloat16
    return honest.rope_by_parts(x.to(half), cos.to(half), sin.to(half), layout).float()


def tables_of_first_token(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return honest.rope_by_parts(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin), layout)


TURNS = {
    "the other layout": other_layout,
    "one layout for both": always_interleaved,
    "turned backwards": backwards,
    "result de-interleaved": de_interleaved,
    "tables of the first token": tables_of_first_token,
    "nothing turned": lambda x, cos, sin, layout: x,
    "only the first half of the pairs": lambda x, cos, sin, layout: torch.cat(
        [honest.rope_by_parts(x, cos, sin, layout)[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]], -1
    ),
}


def elementary() -> list[Wrong]:
    mean = honest.rms(lambda x: (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True))
    norms: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
        "no eps": lambda x, w, eps: honest.NORMS["rsqrt"](x, w, 0.0),
        "eps outside the root": lambda x, w, eps: x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + eps) * w.float(),
        "eps 1e-6": lambda x, w, eps: honest.NORMS["rsqrt"](x, w, 1e-6),
        "mean subtracted": mean,
        "weight plus one": lambda x, w, eps: honest.NORMS["rsqrt"](x, w.float() + 1, eps),
        "no weight": lambda x, w, eps: honest.NORMS["rsqrt"](x, torch.ones_like(w), eps),
        "sum for mean": honest.rms(lambda x: (x * x).sum(-1, keepdim=True)),
        "squares in bfloat16": honest.rms(lambda x: (x * x).to(torch.bfloat16).float().mean(-1, keepdim=True)),
        "row scale of the batch": honest.rms(lambda x: (x * x).mean() if x.numel() else x[..., :1]),
    }  # fmt: skip
    found = [bodied(op, name, make(norm), dtypes=("*",)) for name, norm in norms.items()
             for op, make in (("rms_norm", honest.rms_norm), ("add_rms_norm", honest.add_rms_norm))]  # fmt: skip
    found += [bodied("rope", name, honest.rope(turn)) for name, turn in TURNS.items()]
    found.append(bodied("rope", "in bfloat16", honest.rope(in_bfloat16)))
    silu = torch.nn.functional.silu
    found += [
        bodied("add_rms_norm", "residual left out of the stream", lambda a: (honest.add_rms_norm()(a)[0], a.x.clone())),
        bodied("add_rms_norm", "stream is the norm", lambda a: (honest.add_rms_norm()(a)[0],) * 2, "form"),
        bodied("silu_and_mul", "gate and up swapped", _swapped_halves),
        bodied("silu_and_mul", "interleaved gate and up", _interleaved_halves),
        bodied("silu_and_mul", "gelu", honest.silu_and_mul(torch.nn.functional.gelu)),
        bodied("silu_and_mul", "sigmoid alone", honest.silu_and_mul(torch.sigmoid)),
        bodied("silu_and_mul", "overflow of exp", honest.silu_and_mul(lambda g: g * torch.exp(g) / (1 + torch.exp(g)))),
        bodied("silu_and_mul", "gate cut from below", honest.silu_and_mul(gate=lambda g, m: g.clamp(-m, m))),
        bodied("silu_and_mul", "up cut from above only", honest.silu_and_mul(up=lambda u, m: u.clamp(max=m))),
        bodied("silu_and_mul", "no clamp", honest.silu_and_mul(gate=lambda g, m: g, up=lambda u, m: u)),
        bodied("silu_and_mul", "NaN clamped away", honest.silu_and_mul(up=lambda u, m: torch.where(u > -m, torch.where(u < m, u, m), -m))),
        bodied("silu_and_mul", "silu clamped instead", honest.silu_and_mul(silu, gate=lambda g, m: g, up=lambda u, m: u.clamp(-m, m))),
        bodied("hadamard", "no scale", _unscaled),
        bodied("hadamard", "other order of rows", honest.hadamard(lambda D: honest.sylvester(D).flip(0))),
        bodied("hadamard", "twice", lambda a: honest.hadamard()(Args(x=honest.hadamard()(a), scale=1.0))),
        bodied("hadamard", "last stage left out", honest.hadamard(lambda D: torch.block_diag(*[honest.sylvester(D // 2)] * 2) if D > 1 else torch.ones(1, 1))),
    ]  # fmt: skip
    return found


def _swapped_halves(a: Args) -> Tensor:
    return honest.silu_and_mul()(Args(x=torch.cat(a.x.chunk(2, -1)[::-1], -1), limit=a.limit))


def _interleaved_halves(a: Args) -> Tensor:
    return honest.silu_and_mul()(Args(x=torch.cat([a.x[..., 0::2], a.x[..., 1::2]], -1), limit=a.limit))


def _unscaled(a: Args) -> Tensor:
    return honest.hadamard()(Args(x=a.x, scale=1.0))


# --- experts ---------------------------------------------------------------------------------------------------------


def bias_in_weights(a: Args) -> Any:
    return honest.route(weigh_by_choice=True)(a)


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


def _forward_ids(a: Args) -> Any:
    permuted, offsets, inverse = honest.permute()(a)
    flat = inverse.flatten()
    forward = torch.full_like(flat, -1)
    forward[flat[flat >= 0].long()] = (flat >= 0).nonzero()[:, 0].int()
    return permuted, offsets, forward.view(inverse.shape)


def _transposed(a: Args) -> Tensor:
    E, N, K = a.weight.shape
    return honest.gemm()(Args(**{**vars(a), "weight": a.weight.reshape(E, K, N).mT.contiguous()}))


def _whole_tiles(a: Args) -> Tensor:
    """Only whole tiles of rows, where an expert has one."""
    y = honest.gemm()(a)
    for start, stop in itertools.pairwise(a.expert_offsets.tolist()):
        if stop - start > 4:
            y[start + (stop - start) // 4 * 4 : stop] = 0
    return y


def _last_row_lost(a: Args) -> Tensor:
    y = honest.gemm()(a)
    ends = a.expert_offsets[1:][a.expert_offsets.diff() > 0].long() - 1
    return y.index_fill(0, ends, 0)


# --- prologs ---------------------------------------------------------------------------------------------------------


def the_prologs() -> list[Wrong]:
    shared = {f"rope: {name}": Prolog(turn=turn) for name, turn in TURNS.items()}
    shared |= {
        "products in bfloat16 accumulators": Prolog(product=in_storage),
        "stores nothing": Prolog(store=lambda a: None),
        "-1 stored in slot 0": Prolog(store=honest.write(place=lambda slot: max(slot, 0))),
        "scales no power of two": Prolog(store=honest.write(Quantiser(power=any_scale))),
        "twice the scale": Prolog(store=honest.write(Quantiser(power=lambda *a: 2 * honest.power_by_bits(*a)))),
        "scale and rope swapped": Prolog(store=honest.write(fields=lambda f: (f[0], *reversed(f[1:])))),
    }
    found = [bodied(op, name, make(how)) for name, how in shared.items()
             for op, make in (("mla_prolog", honest.mla_prolog), ("indexer_prolog", honest.indexer_prolog))
             if (op, name) not in RIGHT_THERE]  # fmt: skip
    mla = {
        "eps 1e-6": honest.mla_prolog(eps=lambda eps: 1e-6),
        "rope part first in a head": honest.mla_prolog(heads=lambda q, nope: (q[..., q.shape[-1] - nope :], q[..., : q.shape[-1] - nope])),
        "rope key normed": honest.mla_prolog(norm_rope=True),
        "rope key not turned": honest.mla_prolog(turn_key=False),
        "latent not normed": honest.mla_prolog(latent_normed=False),
        "q_c before its norm": _unnormed_q_c,
        "norm's weights plus one": honest.mla_prolog(Prolog(norm=lambda x, w, eps: honest.NORMS["rsqrt"](x, w.float() + 1, eps))),
        "wrong beyond the first head": _first_head_for_all,
    }  # fmt: skip
    found += [bodied("mla_prolog", name, body) for name, body in mla.items()]
    rms = honest.NORMS["rsqrt"]
    index = {
        "rms norm for layer norm": honest.indexer_prolog(norm=lambda x, w, b, eps: rms(x, w, eps) + b.float()),
        "no norm bias": honest.indexer_prolog(norm=lambda x, w, b, eps: honest.layer_norm(x, w, torch.zeros_like(b), eps)),
        "eps 1e-5": honest.indexer_prolog(norm=lambda x, w, b, eps: honest.layer_norm(x, w, b, 1e-5)),
        "rope part last": honest.indexer_prolog(rope_first=False),
        "queries not turned": honest.indexer_prolog(turned=("k",)),
        "keys not turned": honest.indexer_prolog(turned=("q",)),
        "always half": honest.indexer_prolog(layout=lambda layout: "half"),
        "weights unscaled": honest.indexer_prolog(weights=lambda w, a: w),
        "weights scaled by heads alone": honest.indexer_prolog(weights=lambda w, a: w * a.num_heads**-0.5),
        "weights in bfloat16": honest.indexer_prolog(weights=lambda w, a: (w * a.weights_scale).to(torch.bfloat16).float()),
        "weights without their sign": honest.indexer_prolog(weights=lambda w, a: (w * a.weights_scale).abs()),
        "no hadamard": honest.indexer_prolog(mixed=lambda a: (False, False)),
        "hadamard on queries only": honest.indexer_prolog(mixed=lambda a: (a.hadamard, False)),
        "hadamard unscaled": honest.indexer_prolog(hadamard_scale=lambda D: 1.0),
        "always hadamard": honest.indexer_prolog(mixed=lambda a: (a.w_k.shape[0] == 128,) * 2),
    }  # fmt: skip
    found += [bodied("indexer_prolog", name, body) for name, body in index.items()]
    return found


#: Index keys have no rope part.
RIGHT_THERE = frozenset({("indexer_prolog", "scale and rope swapped")})


def _unnormed_q_c(a: Args) -> Any:
    q, _ = honest.mla_prolog()(a)
    return q, (a.x.float() @ a.w_q_a.float().T).to(a.x.dtype)


def _first_head_for_all(a: Args) -> Any:
    q, q_c = honest.mla_prolog()(a)
    return q[:, :1].repeat(1, q.shape[1], 1), q_c


# --- the tests -------------------------------------------------------------------------------------------------------

ALL = [
    *anywhere(),
    *ANYWHERE,
    *attention(),
    *the_indexer(),
    *the_caches(),
    *elementary(),
    *the_experts(),
    *the_prologs(),
]


@pytest.mark.parametrize("wrong", ALL, ids=lambda wrong: wrong.id)
def test_a_wrong_kernel_fails(wrong: Wrong) -> None:
    failure = first_failure(wrong.op, wrong.make(), provides=wrong.provides, dtypes=wrong.dtypes)
    assert failure is not None, "survived"
    assert failure.verdict == "FAIL"
    assert failure.code in ((wrong.by,) if isinstance(wrong.by, str) else wrong.by), failure.detail
