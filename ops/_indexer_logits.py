"""indexer_logits: the lightning indexer's score of every cached key, for every token.

Legend: T tokens, H index heads, D index head dim, B requests, M pages per request, S max_seq_len.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import batches, caches, checks
from glm5_hal.ops._common.indexer import INDEX_ARGS, INDEX_SCALARS, index_constraints, logit_amplification
from glm5_hal.ops._common.latents import every_code
from glm5_hal.ops._common.paging import causal_limits, requests, slots_of
from glm5_hal.ops._common.precision import up
from glm5_hal.spec import FLOATS, Calibrated, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample, Scalar


def indexer_logits(
    q: Tensor,
    weights: Tensor,
    index_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    max_seq_len: int,
    cache_format: str = "bf16_128",
) -> Tensor:
    """logits[t, s] = Σ_h weights[t,h] · relu(q[t,h]·k[s]) for the keys s that token t sees, −inf elsewhere.

    ``weights`` arrive scaled (by index_n_heads^-0.5 · index_head_dim^-0.5); they may be negative, and so may logits.
    Keys are local positions 0..seq_len−1 of the token's request; the mask is causal, bottom-right aligned, so several
    new tokens per request (speculative decoding, chunked prefill) each have their own limit.
    """
    fmt = FORMATS[cache_format]
    T, _, D = q.shape
    out = torch.full((T, max_seq_len), -torch.inf, dtype=up(weights).dtype, device=q.device)
    wide = torch.promote_types(up(q).dtype, out.dtype)
    for r, tokens, length in requests(cu_seqlens_q, seq_lens):
        positions = torch.arange(min(length, max_seq_len), device=q.device)
        keys, _ = caches.read(fmt, (index_cache,), slots_of(block_table[r], positions, index_cache.shape[1]), D)
        limits = causal_limits(tokens.stop - tokens.start, length, q.device)
        for t, limit in zip(range(tokens.start, tokens.stop), limits.tolist(), strict=True):
            seen = keys[: max(limit, 0)]
            out[t, : len(seen)] = weights[t].to(wide) @ torch.relu(q[t].to(wide) @ seen.T.to(wide))
    return out


def check_values(args: Mapping[str, Any]) -> None:
    name = "indexer_logits"
    checks.batch(name, args, "index_cache")
    checks.in_range(name, "seq_lens", args["seq_lens"], 0, args["max_seq_len"] + 1, "max_seq_len is the width of a row")


GLM5 = {"H": 32, "D": 128}
TINY = {"H": 4, "D": 128}


def samples() -> Iterator[Sample]:
    ragged = ((1, 61), (3, 40), (2, 16), (1, 8))
    edge = frozenset({"edge"})
    for fmt in formats("index"):
        yield Sample(f"decode-{fmt}", {**TINY, "lens": ragged, "page": 8, "format": fmt})
    base = {**TINY, "page": 8, "format": "bf16_128"}
    for fmt in formats("index"):
        two = {**base, "D": 256, "page": 24, "lens": ((1, 60),), "format": fmt}
        yield Sample(f"two_groups-{fmt}", two, dtypes=("bfloat16",))
    yield Sample("prefill", {**base, "lens": ((66, 66), (20, 50))})  # more than a tile of queries
    yield Sample("many_requests", {**base, "lens": batches.MANY_REQUESTS}, dtypes=("bfloat16",))
    # Rows wider than the block table reaches; tokens and requests without a key.
    yield Sample("empty_rows", {**base, "lens": ((0, 9), (2, 30), (3, 0), (5, 2)), "beyond": 200}, tags=edge)
    yield Sample("no_tokens", {**base, "lens": ((0, 9),)}, tags=edge)
    for fmt in formats("index"):
        yield Sample(f"no_pages-{fmt}", {**base, "format": fmt, "lens": ((2, 0), (0, 0)), "spare": 0}, tags=edge)
    yield Sample("many_heads", {**base, "H": 96, "lens": ((2, 33),)})
    # Scores so dense that a choice needs fp32; tokens that see fewer keys than a tile, as many, and more.
    yield Sample("many_keys", {**base, "page": 128, "lens": ((4, 2600), (9, 2052)), "K": 1200})
    # Pages and columns whose number takes more than 16 bits; inner products that float16 does not hold.
    yield Sample("far_pages", {**base, "page": 1, "lens": ((1, 5), (2, 9)), "spare": 70_000}, dtypes=("bfloat16",))
    yield Sample("far_columns", {**base, "H": 1, "page": 128, "lens": ((1, 66_000),)}, dtypes=("bfloat16",))
    large = {**base, "lens": ragged, "q_scale": 2.0**13}
    yield Sample("large_products", large, tags=edge, dtypes=("float16",))
    yield Sample("integers", {**base, "lens": ragged}, fill="exact")
    codes = {**base, "lens": ragged, "format": "fp8_132", "codes": True}
    yield Sample("codes", codes, fill="exact", dtypes=("bfloat16",))
    yield Sample("nan_codes", {**base, "lens": ragged, "format": "fp8_132", "broken": True}, tags=edge)
    yield Sample("ties", {**base, "lens": ((2, 61), (1, 40)), "distinct": 7}, fill="exact")
    glm5 = frozenset({"glm5"})
    for fmt in formats("index"):
        yield Sample(
            f"glm5-decode-{fmt}", {**GLM5, "lens": ((1, 65600), (2, 4097)), "page": 64, "format": fmt}, "standard",
            tags=glm5, dtypes=("bfloat16",) if fmt != "bf16_128" else ("bfloat16", "float32"),
        )  # fmt: skip
    yield Sample(
        "glm5-prefill", {**GLM5, "lens": ((24, 4096),), "page": 64, "format": "bf16_128"}, "standard", tags=glm5,
        dtypes=("bfloat16",),
    )  # fmt: skip
    yield Sample(
        "dsv32-decode", {**GLM5, "H": 64, "lens": ((1, 4096),), "page": 64, "format": "fp8_132"}, "standard",
        dtypes=("bfloat16",),
    )  # fmt: skip


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    H, D, exact = axes["H"], axes["D"], sample.fill == "exact"
    fmt = FORMATS[axes["format"]]
    batch = batches.paged(draw, axes["lens"], axes["page"], axes.get("spare", 3))
    shape = (int(batch.seq_lens.sum()), D)
    keys = draw.small(*shape, dtype=dtype) if exact else draw.normal(*shape, dtype=dtype)
    if axes.get("distinct"):  # so few different keys that scores tie across the k-th place
        keys = keys[draw.integers(0, axes["distinct"], len(keys))]
    if axes.get("codes"):
        keys = every_code(draw, len(keys), D, fmt.group, dtype)
    held, unread = batches.filled(fmt, batch, keys, None)
    if axes.get("broken"):  # the first code of a page's first key is NaN, of either sign
        for request, code in enumerate((0x7F, 0xFF)):
            held[0].flatten(1)[batch.block_table[request, 0], 0] = code
    q_scale = axes.get("q_scale", 1.0)
    q = (
        draw.small(batch.tokens, H, D, dtype=dtype)
        if exact
        else draw.normal(batch.tokens, H, D, dtype=dtype, scale=q_scale)
    )
    if axes.get("codes"):  # one dim of a key alone is exact in fp32
        dims = draw.integers(0, D, batch.tokens, H, 1)
        q = torch.zeros_like(q).scatter(-1, dims, draw.integers(0, 2, batch.tokens, H, 1).to(q.dtype) * 2 - 1)
    weights = draw.small(batch.tokens, H) if exact else draw.normal(batch.tokens, H, scale=2.0**-6)
    beyond = axes.get("beyond")
    args = {
        "q": q,
        "weights": weights,
        "index_cache": held[0],
        "block_table": batch.block_table,
        "seq_lens": batch.seq_lens,
        "cu_seqlens_q": batch.cu_seqlens_q,
        "max_seq_len": batch.block_table.shape[1] * batch.page_size + beyond if beyond else batch.max_seq_len,
        "cache_format": fmt.name,
    }
    return Inputs(args, {"block_table": batch.unused_table, "index_cache": unread[0]})


def fuzz(pick: Pick) -> Sample:
    lens = pick.lens(requests=5, new=9, keys=300)
    axes = {"H": pick.integer(1, 70), "D": 128, "lens": lens, "page": pick.of((8, 1, 16, 64))}
    return Sample("fuzz", {**axes, "format": pick.of(formats("index"))}, tags=frozenset({"empty"}))


def cost(axes: Mapping[str, Any]) -> Cost:
    """With every request as long as a row of the result."""
    T, H, D, S = axes["T"], axes["H"], axes["D"], axes["max_seq_len"]
    cached = axes["B"] * S * axes["cache_row"]
    return Cost(flops=2 * T * S * H * (D + 1), bytes=cached + axes["itemsize"] * T * H * D + 4 * T * (H + S))


SPEC = OpSpec(
    name="indexer_logits",
    group="dsa",
    reference=indexer_logits,
    args=INDEX_ARGS,
    scalars=(Scalar("max_seq_len", "width of the result: at least the longest seq_len", low=0), *INDEX_SCALARS),
    outs=(Out("logits", "T max_seq_len", "A", "scores, −inf where the token does not see the key"),),
    dtypes={"F": FLOATS, "C": (*FLOATS, "uint8"), "A": ("float32", "float64")},
    constraints=index_constraints(),
    rounding="inner products, relu and the sum over heads in fp32; nothing in between is rounded",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"logits": Calibrated(depth=("D", "H"), amplify=logit_amplification)},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    source="spec 4.1, 4.3, 4.5, 6.2; DeepSeek-V3.2",
)
