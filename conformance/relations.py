"""Metamorphic relations: a backend's kernels against each other, with no oracle between them.

Each relation computes one thing in two ways. The two may differ by what both may be off by, and by nothing else: so
a mistake that a kernel shares with the reference shows here, and so does one that shows only beside another op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance import compare
from glm5_hal.conformance.calibrated import calibrated
from glm5_hal.conformance.rounding import unit_roundoff
from glm5_hal.conformance.trial import Finding
from glm5_hal.errors import HalError, suggest
from glm5_hal.formats import FORMATS
from glm5_hal.ops._common import batches, caches
from glm5_hal.spec import Draw

GROUP = "metamorphic"

#: Dims and lengths of the samples: requests of (keys) with one query each, pages, heads, latent and rope dims.
KEYS, PAGE, H, L, R = (61, 40, 16, 9), 8, 3, 128, 16
SCALE = 0.07

#: How far two honest results may be apart in a row, where each rounds its outputs and its probabilities once to storage
#: and sums in fp32 in any order; and in a log-sum-exp, absolutely. Measured over 20 draws on both providers of the CPU:
#: 0.22 of the one and 0.24 of the other at most.
ROUNDINGS, SUMS, LSE = 4.0, 64.0 * 2.0**-24, 32.0 * 2.0**-24

Args = dict[str, Any]
Sides = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Relation:
    """``inputs(draw, dtype)`` makes the arguments, ``sides(ops, args)`` computes each output in two ways."""

    name: str
    what: str
    ops: tuple[str, ...]
    inputs: Callable[[Draw, str], Args]
    sides: Callable[[Any, Args], Sides]


def relation(name: str) -> Relation:
    known = {r.name: r for r in RELATIONS}
    if name not in known:
        raise HalError("UNKNOWN", f"no relation {name!r}", value=name, fix=suggest(name, known))
    return known[name]


def judge(relation: Relation, ops: Any, args: Mapping[str, Any]) -> Finding:
    """Whether both sides agree. What the kernels raise is raised here."""
    errors: dict[str, float] = {}
    budget: dict[str, float] = {}
    problem = ""
    for name, (one, other) in relation.sides(ops, dict(args)).items():
        a, b = one.cpu(), other.cpu()
        if a.is_floating_point():
            unit = unit_roundoff(str(a.dtype)[6:])
            if name == "lse":
                found = compare.absolute(a, b.double(), b, unit=unit, floor=LSE)
            else:
                wide = b.double()
                found = calibrated(a, wide, b.to(a.dtype), unit=unit, floor=ROUNDINGS * unit + SUMS)
        else:
            found = compare.bit_exact(a, b)
        errors |= {f"{name}.{k}": v for k, v in found.errors.items()}
        budget |= {f"{name}.{k}": v for k, v in found.budget.items()}
        problem = problem or (f"{name}: {found.detail}" if not found.ok else "")
    return Finding(not problem, f"{relation.what}: {problem}" if problem else "", errors, budget)


# --- attention -------------------------------------------------------------------------------------------------------


def _cached(draw: Draw, dtype: str, keys: tuple[int, ...] = KEYS, new: int = 1) -> Args:
    """Requests of these lengths with ``new`` queries each over a paged cache, its pages shuffled."""
    batch = batches.paged(draw, [(min(new, n), n) for n in keys], PAGE)
    latent, rope = draw.normal(sum(keys), L, dtype=dtype), draw.normal(sum(keys), R, dtype=dtype)
    (cache,), _ = batches.filled(FORMATS["latent_576"], batch, latent, rope)
    return {
        "q": draw.normal(batch.tokens, H, L + R, dtype=dtype),
        "kv_cache": cache,
        "block_table": batch.block_table,
        "seq_lens": batch.seq_lens,
        "cu_seqlens_q": batch.cu_seqlens_q,
        "scale": SCALE,
        "kv_lora_rank": L,
    }


def _every_key(a: Args) -> Tensor:
    """Indices [T, longest] that name each key that a token sees under the causal mask."""
    rows = []
    for r, n in enumerate(a["seq_lens"].tolist()):
        new = int(a["cu_seqlens_q"][r + 1] - a["cu_seqlens_q"][r])
        rows += [list(range(n - new + i + 1)) for i in range(new)]
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int32, device=a["q"].device)


def _pair(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Sides:
    return {name: (a, b) for name, a, b in zip(("out", "lse"), one, other, strict=True)}


def _sparse_is_dense(ops: Any, a: Args) -> Sides:
    return _pair(ops.sparse_mla(indices=_every_key(a), **a), ops.mla_decode(**a))


def _contiguous(a: Args, cache: str) -> Args:
    """The same keys with the pages of each request one after the other, request by request."""
    table, pages, held = torch.zeros_like(a["block_table"]), [], 0
    for r, n in enumerate(a["seq_lens"].tolist()):
        used = a["block_table"][r, : -(-n // PAGE)]
        table[r, : len(used)] = torch.arange(held, held + len(used))
        held += len(used)
        pages.append(a[cache][used.long()])
    return {**a, cache: torch.cat(pages), "block_table": table}


def _pages_of_decode(ops: Any, a: Args) -> Sides:
    return _pair(ops.mla_decode(**a), ops.mla_decode(**_contiguous(a, "kv_cache")))


def _pages_of_sparse(ops: Any, a: Args) -> Sides:
    indices = _every_key(a)[:, ::2].contiguous()
    straight = _contiguous(a, "kv_cache")
    return _pair(ops.sparse_mla(indices=indices, **a), ops.sparse_mla(indices=indices, **straight))


def _indexed(draw: Draw, dtype: str) -> Args:
    heads, dim = 4, 128
    batch = batches.paged(draw, [(1, n) for n in KEYS], PAGE)
    (cache,), _ = batches.filled(FORMATS["bf16_128"], batch, draw.normal(sum(KEYS), dim, dtype=dtype), None)
    return {
        "q": draw.normal(batch.tokens, heads, dim, dtype=dtype),
        "weights": draw.uniform(batch.tokens, heads, low=0.25, high=1.0),  # no sign: logits do not cancel
        "index_cache": cache,
        "block_table": batch.block_table,
        "seq_lens": batch.seq_lens,
        "cu_seqlens_q": batch.cu_seqlens_q,
    }


def _pages_of_indexer(ops: Any, a: Args) -> Sides:
    longest = int(a["seq_lens"].max())
    one, other = (ops.indexer_logits(max_seq_len=longest, **args) for args in (a, _contiguous(a, "index_cache")))
    return {"logits": (one, other)}


def _split_and_merged(ops: Any, a: Args) -> Sides:
    """Keys up to a page's end and keys from there on, as requests of their own, merged by their lse."""
    cut = 2 * PAGE
    first = {**a, "seq_lens": a["seq_lens"].clamp_max(cut)}
    later = {**a, "seq_lens": (a["seq_lens"] - cut).clamp_min(0), "block_table": a["block_table"][:, 2:].contiguous()}
    (out_a, lse_a), (out_b, lse_b) = ops.mla_decode(**first), ops.mla_decode(**later)
    lse = torch.logaddexp(lse_a, lse_b)
    merged = sum(o.double() * (one - lse).exp().double()[..., None] for o, one in ((out_a, lse_a), (out_b, lse_b)))
    assert isinstance(merged, Tensor)
    return _pair((merged.to(out_a.dtype), lse), ops.mla_decode(**a))


# --- full heads against the absorbed form ----------------------------------------------------------------------------

NOPE, DV = 24, 20


def _with_heads(draw: Draw, dtype: str) -> Args:
    """A cache with what MHA needs beside it. Each projection picks dims and scales them by powers of two, so that it is
    exact in every dtype: the two forms then attend over the very same numbers."""
    a = _cached(draw, dtype, new=5)
    tokens = len(a["q"])
    picked = torch.stack([draw.permutation(L) for _ in range(H)])
    return {
        **a,
        "q": draw.normal(tokens, H, NOPE + R, dtype=dtype),
        "k_dims": picked[:, :NOPE],
        "v_dims": picked[:, -DV:],
        "k_size": 2.0 ** draw.integers(-1, 2, H, NOPE),
    }


def _mha_is_absorbed(ops: Any, a: Args) -> Sides:
    k_dims, v_dims, k_size = (a[n] for n in ("k_dims", "v_dims", "k_size"))
    absorbed = {k: v for k, v in a.items() if k not in ("k_dims", "v_dims", "k_size")}
    q, lengths = a["q"], a["seq_lens"].tolist()
    size = k_size.to(q.dtype)
    wide = q.new_zeros(len(q), H, L).scatter(2, k_dims.expand(len(q), -1, -1), q[..., :NOPE] * size)
    out, lse = ops.mla_decode(**{**absorbed, "q": torch.cat([wide, q[..., NOPE:]], -1)})
    out = out.gather(2, v_dims.expand(len(q), -1, -1))
    rows = []
    for r, n in enumerate(lengths):
        at = torch.arange(n, device=q.device)
        rows.append(a["block_table"][r].long()[at // PAGE] * PAGE + at % PAGE)
    latent, rope = caches.read(FORMATS["latent_576"], (a["kv_cache"],), torch.cat(rows), L)
    assert rope is not None
    latent, rope = latent.to(q.dtype), rope.to(q.dtype)
    full = {
        "q": q,
        "k": torch.cat([latent[:, k_dims] * size, rope[:, None].expand(-1, H, -1)], -1),
        "v": latent[:, v_dims].contiguous(),
        "cu_seqlens_q": a["cu_seqlens_q"],
        "cu_seqlens_k": torch.tensor([0, *lengths], device=q.device).cumsum(0).int(),
        "scale": SCALE,
    }
    return _pair(ops.mla_prefill(**full), (out, lse))


# --- chunks ----------------------------------------------------------------------------------------------------------


def _prompt(draw: Draw, dtype: str) -> Args:
    n, made = 45, {}
    for name, width in (("q", NOPE + R), ("k", NOPE + R), ("v", DV)):
        made[name] = draw.normal(n, H, width, dtype=dtype)
    return {**made, "cu_seqlens_q": torch.tensor([0, n], dtype=torch.int32), "scale": 0.2}


def _chunks(ops: Any, a: Args) -> Sides:
    n, cuts = len(a["q"]), (0, 17, 32, 45)
    whole = ops.mla_prefill(**a, cu_seqlens_k=a["cu_seqlens_q"])
    outs, lses = [], []
    for start, stop in pairwise(cuts):
        ends = (a["cu_seqlens_q"].new_tensor([0, m]) for m in (stop - start, stop))
        args = {**a, "q": a["q"][start:stop], "k": a["k"][:stop], "v": a["v"][:stop]}
        args |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), ends, strict=True))
        out, lse = ops.mla_prefill(**args)
        outs.append(out)
        lses.append(lse)
    assert cuts[-1] == n
    return _pair((torch.cat(outs), torch.cat(lses)), whole)


# --- experts ---------------------------------------------------------------------------------------------------------


def _routed(draw: Draw, dtype: str) -> Args:
    T, K, D, I, E = 13, 3, 64, 40, 7  # noqa: E741 - tokens, experts per token, hidden, intermediate, experts
    ids = draw.integers(0, 1 << 40, T, E).argsort(dim=-1, stable=True)[:, :K].int()
    ids[draw.integers(0, 4, T, K) == 0] = -1
    return {
        "x": draw.normal(T, D, dtype=dtype),
        "topk_weights": draw.uniform(T, K, low=0.25, high=1.0),
        "topk_ids": ids,
        "w_gate_up": draw.normal(E, 2 * I, D, dtype=dtype, scale=2.0**-3),
        "w_down": draw.normal(E, D, I, dtype=dtype, scale=2.0**-3),
        "order": draw.permutation(E),
    }


def _experts_permuted(ops: Any, a: Args) -> Sides:
    order = a.pop("order")
    place = order.argsort().int()  # where each expert has gone
    ids = torch.where(a["topk_ids"] < 0, -1, place[a["topk_ids"].clamp_min(0).long()])
    moved = {**a, "topk_ids": ids, "w_gate_up": a["w_gate_up"][order], "w_down": a["w_down"][order]}
    return {"out": (ops.moe_experts(**moved), ops.moe_experts(**a))}


def _identity_experts(ops: Any, a: Args) -> Sides:
    x, weights, ids = a["x"], a["topk_weights"], a["topk_ids"]
    rows, _, inverse = ops.moe_permute(x, ids, num_experts=len(a["w_down"]))
    total = torch.where(ids < 0, 0.0, weights).double().sum(-1, keepdim=True)
    return {"out": (ops.moe_combine(rows, weights, inverse), (x.double() * total).to(x.dtype))}


RELATIONS = (
    Relation(
        "sparse_is_dense", "sparse_mla over every index is mla_decode", ("sparse_mla", "mla_decode"),
        lambda draw, dtype: _cached(draw, dtype, new=3), _sparse_is_dense,
    ),
    Relation(
        "mha_is_absorbed", "mla_prefill with full heads is mla_decode in latent space", ("mla_prefill", "mla_decode"),
        _with_heads, _mha_is_absorbed,
    ),
    Relation(
        "split_and_merged", "two halves of the keys, merged by lse, are one pass", ("mla_decode",),
        _cached, _split_and_merged,
    ),
    Relation(
        "pages_of_decode", "shuffled pages are contiguous ones", ("mla_decode",),
        lambda draw, dtype: _cached(draw, dtype, new=3), _pages_of_decode,
    ),
    Relation(
        "pages_of_sparse", "shuffled pages are contiguous ones", ("sparse_mla",),
        lambda draw, dtype: _cached(draw, dtype, new=3), _pages_of_sparse,
    ),
    Relation(
        "pages_of_indexer", "shuffled pages are contiguous ones", ("indexer_logits",), _indexed, _pages_of_indexer,
    ),
    Relation("chunked_prefill", "a prompt in chunks is the whole prompt", ("mla_prefill",), _prompt, _chunks),
    Relation(
        "experts_permuted", "experts in another order give the same", ("moe_experts",), _routed, _experts_permuted,
    ),
    Relation(
        "identity_experts", "permuted and combined, tokens are themselves times the sum of their weights",
        ("moe_permute", "moe_combine"), _routed, _identity_experts,
    ),
)  # fmt: skip
