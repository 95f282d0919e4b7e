"""mla_prefill: attention with full heads (the MHA form) over ragged batches, nothing paged.

Legend: T query tokens, S key tokens, H heads, Dqk and Dv head dims of queries and of values, B1 requests + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common import batches, checks
from glm5_hal.ops._common.attention import dense_amplification, softmax
from glm5_hal.ops._common.latents import pointed_keys, pointing_queries, pushed_down, values
from glm5_hal.ops._common.paging import causal_limits, offsets
from glm5_hal.ops._common.precision import down, up
from glm5_hal.plan import host_list
from glm5_hal.spec import (
    FLOATS,
    AbsoluteError,
    Arg,
    BadInput,
    Calibrated,
    Cost,
    Draw,
    Inputs,
    OpSpec,
    Out,
    Pick,
    Sample,
    Scalar,
)


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """out[t,h] = Σ_s p_s v[s,h] with p = softmax_s(scale · q[t,h]·k[s,h]), over the keys s of t's own request.

    ``k`` is W_UK c ⊕ k_pe (the one rope key repeated for every head) and ``v`` is W_UV c. Causal is bottom-right
    aligned: the queries are the last ones of the keys, so of n queries with m keys, query i (from 0) sees the keys
    0..m−n+i; a chunk of a longer prompt passes all keys so far. A query that sees no key (i < n−m, or m = 0) gets out
    0 and lse −inf, whatever it holds. Without ``causal`` every query sees all m keys.
    """
    T, H, _ = q.shape
    out = up(q).new_zeros(T, H, v.shape[-1])
    lse = up(q).new_full((T, H), -torch.inf)
    queries, keys = pairwise(host_list(cu_seqlens_q)), pairwise(host_list(cu_seqlens_k))
    for (start, stop), (low, high) in zip(queries, keys, strict=True):
        n, m = stop - start, high - low
        blind = n if m == 0 else max(n - m, 0) if causal else 0  # the first queries, which see nothing
        rows = slice(start + blind, stop)
        if blind == n:
            continue
        scores = torch.einsum("nhd,mhd->hnm", up(q[rows]), up(k[low:high])) * scale
        if causal:
            limits = causal_limits(n, m, q.device)[blind:]
            scores.masked_fill_(torch.arange(m, device=q.device) >= limits[:, None], -torch.inf)
        p, total, lse_HN = softmax(scores, q)
        out[rows] = torch.einsum("hnm,mhd->nhd", p, up(v[low:high])) / total.transpose(0, 1)
        lse[rows] = lse_HN.T
    return down(out, q), lse


def check_values(args: Mapping[str, Any]) -> None:
    checks.offsets("mla_prefill", "cu_seqlens_q", args["cu_seqlens_q"], args["q"].shape[0], "query tokens")
    checks.offsets("mla_prefill", "cu_seqlens_k", args["cu_seqlens_k"], args["k"].shape[0], "key tokens")


GLM5 = {"H": 64, "Dqk": 256, "Dv": 256, "scale": 0.0625}
DSV32 = {"H": 128, "Dqk": 192, "Dv": 128, "scale": 0.135234}
TINY = {"H": 3, "Dqk": 24, "Dv": 20, "scale": 0.2}


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    ragged = ((5, 5), (3, 17), (1, 9), (37, 37))
    yield Sample("causal", {**TINY, "lens": ragged})
    yield Sample("many_keys", {**TINY, "lens": ((131, 530), (9, 9))})  # more than a tile of queries and of keys
    many = {**TINY, "H": 1, "lens": ((2, 1100), (260, 260), (128, 1160))}  # than two of queries, than many of keys
    yield Sample("many_tiles", many, dtypes=("bfloat16",))
    yield Sample("many_requests", {**TINY, "lens": batches.MANY_REQUESTS}, dtypes=("bfloat16",))
    below = {**TINY, "lens": ((1, 2), (2, 19)), "below_zero": True}  # a running maximum that starts at 0 is too high
    yield Sample("below_zero", below, tags=edge, dtypes=("bfloat16",))
    yield Sample("far_peak", {**TINY, "lens": ((3, 700),), "q_scale": 128.0}, tags=edge)  # exp of the gap overflows
    large = {**TINY, "Dqk": 96, "lens": ragged, "q_scale": 2.0**13, "scale": 0.1 / 2**13}
    yield Sample("large_raw_scores", large, tags=edge, dtypes=("float16",))  # float16 holds them only once scaled
    yield Sample("bidirectional", {**TINY, "lens": (*ragged, (2, 200)), "causal": False})
    yield Sample("chunk", {**TINY, "lens": ((7, 61), (20, 33))})
    yield Sample("empty_rows", {**TINY, "lens": ((0, 9), (4, 0), (5, 2), (0, 0), (2, 2))}, tags=edge)
    yield Sample("empty_bidirectional", {**TINY, "lens": ((5, 2), (4, 0), (0, 3)), "causal": False}, tags=edge)
    yield Sample("no_tokens", {**TINY, "lens": ((0, 9),)}, tags=edge)
    yield Sample("many_heads", {**TINY, "H": 96, "Dv": 24, "lens": ((6, 11),)})
    yield Sample("peaked", {**TINY, "lens": ragged, "q_scale": 8.0})
    yield Sample("uniform", {**TINY, "lens": ((1, 32), (2, 2), (1, 1))}, fill="exact")
    cancelling = {**TINY, "H": 1, "lens": ((1, 512),), "cancelling": True}
    yield Sample("cancelling", cancelling, fill="exact", dtypes=("bfloat16",))
    yield Sample("uniform_bidirectional", {**TINY, "lens": ((5, 16), (3, 64), (2, 1)), "causal": False}, fill="exact")
    pointer = {**TINY, "scale": 1.0, "lens": (*ragged, (6, 2), (4, 64)), "pointer": True}
    yield Sample("pointer", pointer, fill="exact", dtypes=("bfloat16",))
    yield Sample(
        "glm5-prefill", {**GLM5, "lens": ((128, 128), (32, 769))}, "standard", tags=glm5, dtypes=("bfloat16", "float32")
    )
    yield Sample("glm5-chunk", {**GLM5, "lens": ((16, 1024), (1, 65))}, "standard", tags=glm5, dtypes=("bfloat16",))
    yield Sample("dsv32-prefill", {**DSV32, "lens": ((64, 64), (16, 513))}, "standard", dtypes=("bfloat16",))


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    lens, causal = axes["lens"], axes.get("causal", True)
    H, Dqk, Dv = axes["H"], axes["Dqk"], axes["Dv"]
    T, S = (sum(n) for n in zip(*lens, strict=True))
    q = draw.normal(T, H, Dqk, dtype=dtype, scale=axes.get("q_scale", 1.0))
    k = draw.normal(S, H, Dqk, dtype=dtype)
    v = values(sample, dtype, draw, [m for _, m in lens], H, Dv)
    limits = [torch.arange(m - n + 1, m + 1) if causal else torch.full((n,), m) for n, m in lens]
    visible = torch.cat(limits).clamp_min(0)
    if sample.fill == "exact":  # equal scores over a power of two of keys, or one key that takes all
        q = torch.zeros_like(q)
    if axes.get("pointer"):
        q = pointing_queries(draw, visible, H, Dqk).to(q.dtype)
        k = pointed_keys([m for _, m in lens], Dqk).to(k.dtype)[:, None].repeat(1, H, 1)
    if axes.get("below_zero"):
        k[..., -1] = 1.0
        q = pushed_down(q, axes["scale"])
    blind = (visible == 0)[:, None, None]
    unseen = torch.cat([torch.full((m,), n == 0) for n, m in lens])[:, None, None]
    args = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": offsets([n for n, _ in lens]),
        "cu_seqlens_k": offsets([m for _, m in lens]),
        "scale": axes["scale"],
        "causal": causal,
    }
    masks = {"q": blind, "k": unseen, "v": unseen}
    return Inputs(args, {name: mask.expand_as(args[name]).clone() for name, mask in masks.items()})


def fuzz(pick: Pick) -> Sample:
    axes = {"H": pick.integer(1, 9), "Dqk": pick.integer(1, 40), "Dv": pick.integer(1, 40), "scale": 0.2}
    lens = pick.lens(requests=4, new=40, keys=90)
    return Sample("fuzz", {**axes, "lens": lens, "causal": pick.of((True, False))}, tags=frozenset({"empty"}))


def cost(axes: Mapping[str, Any]) -> Cost:
    """As one request without a mask."""
    T, S, H, Dqk, Dv = (axes[a] for a in ("T", "S", "H", "Dqk", "Dv"))
    return Cost(flops=2 * T * S * H * (Dqk + Dv), bytes=axes["itemsize"] * H * (T + S) * (Dqk + Dv))


def _falling(name: str) -> BadInput:
    return BadInput(f"{name}_falls", "VALUE", lambda args: {**args, name: args[name].flip(0)})


def _short(name: str) -> BadInput:
    return BadInput(f"{name}_short", "VALUE", lambda args: {**args, name: (args[name] - 1).clamp_min(0)})


SPEC = OpSpec(
    name="mla_prefill",
    group="mla",
    reference=mla_prefill,
    args=(
        Arg("q", "T H Dqk", "F", "queries, nope dims then rope dims"),
        Arg("k", "S H Dqk", "F", "keys, nope dims then rope dims"),
        Arg("v", "S H Dv", "F", "values"),
        Arg("cu_seqlens_q", "B1", "int32", "offsets of each request's queries, from 0 to T"),
        Arg("cu_seqlens_k", "B1", "int32", "offsets of each request's keys, from 0 to S"),
    ),
    scalars=(
        Scalar("scale", "softmax scale: 0.0625 for GLM-5, 0.135234 for DeepSeek-V3.2"),
        Scalar("causal", "whether a query sees only the keys up to its own place"),
    ),
    outs=(
        Out("out", "T H Dv", "F", "attention output"),
        Out("lse", "T H", "acc", "natural log of the sum of exponentials, −inf where there was no key"),
    ),
    dtypes={"F": FLOATS},
    rounding="scores and softmax in fp32; probabilities may be rounded to q's dtype before the product with the values",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={
        "out": Calibrated(depth=("Dqk",), amplify=dense_amplification),
        "lse": AbsoluteError(depth=("Dqk",), amplify=dense_amplification),
    },
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        _falling("cu_seqlens_q"),
        _falling("cu_seqlens_k"),
        _short("cu_seqlens_q"),
        _short("cu_seqlens_k"),
    ),
    source="spec 3.2, 12, 14.8",
)
