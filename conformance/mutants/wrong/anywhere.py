"""What can go wrong with any op, done to its reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants.wrong.base import FP32, Fn, Wrong, wrapped
from glm5_hal.errors import HalError
from glm5_hal.ops import specs


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


def past_its_own(op: str) -> Callable[[], Fn]:
    """Writes one element beyond a buffer that it has allocated, where an allocator mostly has room."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        room = torch.empty(7)
        ctypes.memset(room.data_ptr() + 28, 0, 4)  # within what malloc rounds 28 bytes up to
        return reference(**a)

    return lambda: wrapped(op, run)


def no_nan(op: str, name: str) -> Callable[[], Fn]:
    """What is not finite is taken for 0 before anything is computed."""
    return lambda: wrapped(op, lambda ref, a: ref(**{**a, name: a[name].nan_to_num(0.0, 0.0, 0.0)}))


def nothing_of(tokens: int) -> Callable[[], Fn]:
    """A cache write that loses a batch of just this size: no sample has it, a sample without its ends does."""
    return lambda: wrapped("mla_cache_write", lambda ref, a: None if len(a["kv_c"]) == tokens else ref(**a))


def doubles_the_shared() -> Fn:
    """In place on x where the caller passed it as residual too, and right about what that gives."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        if a["x"].data_ptr() == a["residual"].data_ptr():
            a["x"].mul_(2)
        return reference(**a)

    return wrapped("add_rms_norm", run)


def rounded(op: str, name: str) -> Callable[[], Fn]:
    """Reads an argument in bfloat16."""
    return lambda: wrapped(op, lambda ref, a: ref(**{**a, name: a[name].to(torch.bfloat16).to(a[name].dtype)}))


FLOATING = {
    "rms_norm": 0, "add_rms_norm": 0, "rope": 0, "silu_and_mul": 0, "hadamard": 0, "mla_prefill": 0, "mla_decode": 0,
    "mla_prolog": 0, "sparse_mla": 0, "indexer_logits": 0, "indexer_prolog": 0, "grouped_gemm": 0, "moe_combine": 0,
    "moe_experts": 0, "moe_route": 0,
}  # fmt: skip


#: Of which float64 inputs give float32 outputs, or that have no float64 sample.
COARSE = ("moe_route", "indexer_logits")


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
        found.append(Wrong(op, "one element 2 % off", result(op, one, at), ("accuracy", "batch"), dtypes=FP32))
        half = result(op, lambda t: t.to(torch.bfloat16).to(t.dtype), at)
        found.append(Wrong(op, "computed in bfloat16", half, dtypes=FP32))
        if op not in COARSE:
            single = result(op, lambda t: t.float().to(t.dtype), at)
            found.append(Wrong(op, "computed in float32", single, dtypes=("float64",)))
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
    *(Wrong(op, f"a NaN in {name} becomes a number", no_nan(op, name), "nonfinite", dtypes=("*",)) for op, name in {
        "mla_cache_write": "kv_c", "moe_permute": "x", "add_rms_norm": "residual", "rope": "x",
    }.items()),
    *(Wrong(op, "writes past its own buffer", past_its_own(op), "workspace", dtypes=("*",)) for op in (
        "rms_norm", "sparse_mla", "grouped_gemm", "topk_indices",
    )),
    Wrong("mla_cache_write", "nothing of a batch of 17 is written", nothing_of(17), "batch", dtypes=("*",)),
    Wrong("add_rms_norm", "doubles x where it is the residual too", doubles_the_shared, "alias", dtypes=("*",)),
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
    Wrong("rms_norm", "exits", raising("rms_norm", SystemExit(0)), "KERNEL"),
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
