"""mla_decode: attention of every new token over all keys of its request, in the absorbed form.

Legend: T tokens, H heads, L kv_lora_rank, R rope dim, W = L+R, B requests, M pages per request, N pages, P page size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import batches, caches, checks
from glm5_hal.ops._common.attention import KV_CACHE, ROPE_CACHE, attend, cache_constraints, dense_amplification
from glm5_hal.ops._common.latents import latents, pointing_queries, pushed_down
from glm5_hal.ops._common.paging import BATCH, causal_limits, requests, slots_of
from glm5_hal.ops._common.precision import down, up
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


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    rope_cache: Tensor | None = None,
    *,
    scale: float,
    kv_lora_rank: int,
    cache_format: str = "latent_576",
) -> tuple[Tensor, Tensor]:
    """out[t,h] = Σ_s p_s c_s with p = softmax_s(scale · q[t,h]·(c_s ⊕ r_s)), over all keys s that token t sees.

    The new tokens' own keys are in the cache already: ``seq_lens`` counts them. The mask is causal, bottom-right
    aligned: of n new tokens with m cached keys, token i (from 0) sees the keys 0..m−n+i, so several tokens of one
    request (speculative decoding, chunked prefill) each have their own limit. A token that sees no key (i < n−m, or
    m = 0) gets out 0 and lse −inf, whatever its query holds.

    ``scale`` is that of the form with full heads (256^-0.5 for GLM-5), never W^-0.5. Latents are keys and values at
    once; out stays in latent space, and multiplying it by W_UV is the caller's. Over indices that name every visible
    key, `sparse_mla` gives the same result.
    """
    fmt = FORMATS[cache_format]
    T, H, _ = q.shape
    out = up(q).new_zeros(T, H, kv_lora_rank)
    lse = up(q).new_full((T, H), -torch.inf)
    held = caches.held(kv_cache, rope_cache)
    for r, tokens, length in requests(cu_seqlens_q, seq_lens):
        slots = slots_of(block_table[r], torch.arange(length, device=q.device), kv_cache.shape[1])
        latent, rope = caches.read(fmt, held, slots, kv_lora_rank)
        limits = causal_limits(tokens.stop - tokens.start, length, q.device).tolist()
        for t, limit in zip(range(tokens.start, tokens.stop), limits, strict=True):
            if limit > 0:
                out[t], lse[t] = attend(q[t], latent[:limit], None if rope is None else rope[:limit], scale)
    return down(out, q), lse


def check_values(args: Mapping[str, Any]) -> None:
    checks.batch("mla_decode", args, "kv_cache")


GLM5 = {"H": 64, "L": 512, "R": 64, "page": 64, "scale": 0.0625}
DSV32 = {**GLM5, "H": 128, "scale": 0.135234}
TINY = {"H": 3, "L": 128, "R": 16, "page": 8, "scale": 0.07}


def samples() -> Iterator[Sample]:
    around_pages = ((1, 7), (2, 8), (3, 9), (4, 61))
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    for fmt in formats("latent"):
        yield Sample(f"decode-{fmt}", {**TINY, "lens": around_pages, "format": fmt})
    for fmt in (name for name in formats("latent") if FORMATS[name].group):
        yield Sample(f"four_groups-{fmt}", {**TINY, "L": 512, "lens": around_pages, "format": fmt})
    base = {**TINY, "format": "latent_576"}
    # Tokens that see as many keys as a tile, and more; pages larger than GLM-5's.
    yield Sample("many_keys", {**base, "page": 128, "lens": ((3, 1026), (1, 300))})
    yield Sample("far_peak", {**base, "lens": ((2, 1100),), "q_scale": 128.0}, tags=edge)  # exp of the gap overflows
    yield Sample("chunked_prefill", {**base, "lens": ((66, 70), (20, 50))})  # more than a tile of queries
    yield Sample("many_requests", {**base, "lens": batches.MANY_REQUESTS}, dtypes=("bfloat16",))
    odd = {**base, "L": 100, "page": 24, "lens": ((1, 60), (1, 128))}  # no powers of two, but for a length
    yield Sample("odd_sizes", odd, tags=edge, dtypes=("bfloat16",))
    below = {**base, "lens": ((1, 2), (2, 19)), "below_zero": True}  # a running maximum that starts at 0 is too high
    yield Sample("below_zero", below, tags=edge, dtypes=("bfloat16",))
    for fmt in formats("latent"):
        broken = {**base, "lens": ((2, 9), (1, 20), (1, 12)), "format": fmt, "broken": True}
        yield Sample(f"broken_rows-{fmt}", broken, tags=edge, dtypes=("bfloat16",))
    # Pages whose number takes more than 16 bits; scores that float16 holds once they are scaled, but not before.
    far = {**base, "L": 16, "R": 4, "page": 1, "lens": ((1, 5), (2, 9)), "spare": 70_000}
    yield Sample("far_pages", far, tags=edge, dtypes=("bfloat16",))
    large = {**base, "lens": around_pages, "q_scale": 2.0**13, "scale": 0.07 / 2**13}
    yield Sample("large_raw_scores", large, tags=edge, dtypes=("float16",))
    yield Sample("empty_rows", {**base, "lens": ((0, 9), (2, 0), (4, 2), (1, 1), (0, 0))}, tags=edge)
    yield Sample("no_tokens", {**base, "lens": ((0, 9),)}, tags=edge)
    yield Sample("many_heads", {**base, "H": 96, "lens": ((2, 33),)})
    yield Sample("page_of_one", {**base, "page": 1, "lens": ((1, 5), (2, 300))}, tags=edge)
    yield Sample("peaked", {**base, "lens": around_pages, "q_scale": 8.0})
    yield Sample("uniform", {**base, "lens": ((1, 64), (2, 2), (1, 16))}, fill="exact")
    cancelling = {**base, "H": 1, "lens": ((1, 512),), "cancelling": True}
    yield Sample("cancelling", cancelling, fill="exact", dtypes=("bfloat16",))
    pointer = {**TINY, "scale": 1.0, "lens": (*around_pages, (5, 3), (9, 40)), "pointer": True}
    for fmt in formats("latent"):
        yield Sample(f"pointer-{fmt}", {**pointer, "format": fmt}, fill="exact", dtypes=("bfloat16",))
    ragged = ((1, 4097), (2, 2048), (4, 2049), (1, 63), (3, 64), (1, 65), (0, 128))
    yield Sample(
        "glm5-decode-64k", {**GLM5, "lens": ((1, 65600),), "format": "latent_576"}, "standard", tags=glm5,
        dtypes=("bfloat16",),
    )  # fmt: skip
    yield Sample(
        "glm5-decode-ragged", {**GLM5, "lens": ragged, "format": "latent_576"}, "standard", tags=glm5,
        dtypes=("bfloat16", "float32"),
    )  # fmt: skip
    for fmt in formats("latent")[1:]:
        yield Sample(
            f"glm5-decode-{fmt}", {**GLM5, "lens": ((1, 4096), (2, 2049)), "format": fmt}, "standard", tags=glm5,
            dtypes=("bfloat16",),
        )  # fmt: skip
    yield Sample(
        "dsv32-decode", {**DSV32, "lens": ((1, 4096), (2, 63)), "format": "latent_576"}, "standard",
        dtypes=("bfloat16",),
    )  # fmt: skip


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    H, L, R = (axes[a] for a in "HLR")
    made = latents(sample, dtype, draw)
    T, visible = made.batch.tokens, made.batch.visible()
    q = draw.normal(T, H, L + R, dtype=dtype, scale=axes.get("q_scale", 1.0))
    if sample.fill == "exact":  # equal scores over a power of two of keys, or one key that takes all
        q = torch.zeros_like(q)
    if axes.get("pointer"):
        q[..., L:] = pointing_queries(draw, visible, H, R).to(q.dtype)
    if axes.get("below_zero"):
        q = pushed_down(q, axes["scale"])
    blind = (visible == 0)[:, None, None].expand_as(q).clone()
    return Inputs({"q": q, **made.args}, {"q": blind, **made.poison})


def fuzz(pick: Pick) -> Sample:
    axes = {**TINY, "H": pick.integer(1, 70), "L": 128 * pick.integer(1, 3), "R": 2 * pick.integer(1, 20)}
    lens = pick.lens(requests=5, new=9, keys=300)
    paged = {"lens": lens, "page": pick.of((8, 1, 16, 64)), "format": pick.of(formats("latent"))}
    return Sample("fuzz", {**axes, **paged}, tags=frozenset({"empty"}))


def cost(axes: Mapping[str, Any]) -> Cost:
    """With every request as long as the block table."""
    T, H, L, R, S = axes["T"], axes["H"], axes["kv_lora_rank"], axes["W"] - axes["kv_lora_rank"], axes["M"] * axes["P"]
    cached, rows = axes["B"] * S * axes["cache_row"], T * H * (axes["itemsize"] * (2 * L + R) + 4)
    return Cost(flops=2 * T * S * H * (2 * L + R), bytes=cached + rows)


def _past_table(args: dict[str, Any]) -> dict[str, Any]:
    room = args["block_table"].shape[1] * args["kv_cache"].shape[1]
    return {**args, "seq_lens": torch.full_like(args["seq_lens"], room + 1)}


def _no_such_page(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, "block_table": torch.full_like(args["block_table"], args["kv_cache"].shape[0])}


def _other_rope_cache(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, "rope_cache": args["kv_cache"].clone()}


SPEC = OpSpec(
    name="mla_decode",
    group="mla",
    reference=mla_decode,
    args=(
        Arg("q", "T H W", "F", "absorbed queries: kv_lora_rank latent dims, then the rope dims"),
        KV_CACHE,
        *BATCH,
        ROPE_CACHE,
    ),
    scalars=(
        Scalar("scale", "softmax scale: 0.0625 for GLM-5 (256^-0.5, not 576^-0.5), 0.135234 for DeepSeek-V3.2"),
        Scalar("kv_lora_rank", "latent width L", low=1),
        Scalar("cache_format", "named cache format", choices=formats("latent")),
    ),
    outs=(
        Out("out", "T H kv_lora_rank", "F", "attention output in latent space"),
        Out("lse", "T H", "acc", "natural log of the sum of exponentials, −inf where there was no key"),
    ),
    dtypes={"F": FLOATS, "C": (*FLOATS, "uint8")},
    constraints=cache_constraints(),
    rounding="scores and softmax in fp32; probabilities may be rounded to q's dtype before the product with the values",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={
        "out": Calibrated(depth=("W",), amplify=dense_amplification),
        "lse": AbsoluteError(depth=("W",), amplify=dense_amplification),
    },
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        BadInput("seq_lens_past_table", "VALUE", _past_table),
        BadInput("seq_lens_negative", "VALUE", lambda args: {**args, "seq_lens": -args["seq_lens"]}),
        BadInput("block_table_past_cache", "VALUE", _no_such_page),
        BadInput("cu_seqlens_q_falls", "VALUE", lambda args: {**args, "cu_seqlens_q": args["cu_seqlens_q"].flip(0)}),
        BadInput("kv_lora_rank_zero", "SCALAR", lambda args: {**args, "kv_lora_rank": 0}),
        BadInput("kv_lora_rank_all", "SHAPE", lambda args: {**args, "kv_lora_rank": args["q"].shape[-1]}),
        BadInput("cache_format_unknown", "SCALAR", lambda args: {**args, "cache_format": "latent"}),
        BadInput("cache_dtype", "DTYPE", lambda args: {**args, "kv_cache": args["kv_cache"].to(torch.float64)}),
        BadInput("rope_cache_not_of_format", "SHAPE", _other_rope_cache),
    ),
    source="spec 3.2, 3.3, 6.1, 13, 14.8",
)
