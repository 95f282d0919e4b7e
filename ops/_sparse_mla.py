"""sparse_mla: attention of every token over the keys that its own indices name, in the absorbed form.

Legend: T tokens, H heads, L kv_lora_rank, R rope dim, W = L+R, K indices per token, B requests, M pages per request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import batches, caches, checks
from glm5_hal.ops._common.attention import KV_CACHE, ROPE_CACHE, attend, cache_constraints, score_amplification
from glm5_hal.ops._common.latents import latents, pushed_down
from glm5_hal.ops._common.paging import BATCH, requests, slots_of
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


def sparse_mla(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    rope_cache: Tensor | None = None,
    *,
    scale: float,
    kv_lora_rank: int,
    cache_format: str = "latent_576",
) -> tuple[Tensor, Tensor]:
    """out[t,h] = Σ_j p_j c_j with p = softmax_j(scale · q[t,h]·(c_j ⊕ r_j)), over the keys j that indices[t] names.

    One index set per token serves all heads. Indices are positions local to the request, resolved through
    ``block_table``; -1 is the only invalid value and may stand anywhere; duplicates must not occur. Which keys a token
    may see was decided before (masks come before top-k), so no mask is applied here. The order of the indices does
    not change the result beyond rounding. A token without a valid index gets out 0 and lse −inf.
    """
    fmt = FORMATS[cache_format]
    T, H, _ = q.shape
    out = up(q).new_zeros(T, H, kv_lora_rank)
    lse = up(q).new_full((T, H), -torch.inf)
    held = caches.held(kv_cache, rope_cache)
    page = kv_cache.shape[1]
    for r, tokens, _ in requests(cu_seqlens_q, seq_lens):
        for t in range(tokens.start, tokens.stop):
            chosen = indices[t][indices[t] >= 0].long()
            if chosen.numel():
                latent, rope = caches.read(fmt, held, slots_of(block_table[r], chosen, page), kv_lora_rank)
                out[t], lse[t] = attend(q[t], latent, rope, scale)
    return down(out, q), lse


def check_values(args: Mapping[str, Any]) -> None:
    name = "sparse_mla"
    checks.batch(name, args, "kv_cache")
    checks.chosen(name, args["indices"], args["seq_lens"], args["cu_seqlens_q"])


GLM5 = {"H": 64, "L": 512, "R": 64, "K": 2048, "scale": 0.0625}
TINY = {"H": 3, "L": 128, "R": 16, "K": 24, "scale": 0.07}


def samples() -> Iterator[Sample]:
    ragged = ((1, 61), (3, 40), (2, 16), (1, 8))
    for fmt in formats("latent"):
        yield Sample(f"decode-{fmt}", {**TINY, "lens": ragged, "page": 8, "format": fmt})
    for fmt in (name for name in formats("latent") if FORMATS[name].group):
        yield Sample(f"four_groups-{fmt}", {**TINY, "L": 512, "lens": ragged, "page": 8, "format": fmt})
    base = {**TINY, "page": 8, "format": "latent_576"}
    edge = frozenset({"edge"})
    # More than a tile or a split of them, more than GLM-5 chooses; pages larger than its own.
    yield Sample("many_keys", {**base, "K": 2304, "page": 128, "lens": ((1, 2310), (2, 300))})
    yield Sample("far_peak", {**base, "K": 1100, "lens": ((1, 1100),), "q_scale": 128.0}, tags=edge)
    yield Sample("prefill", {**base, "lens": ((50, 50), (20, 50))})
    yield Sample("many_requests", {**base, "lens": batches.MANY_REQUESTS}, dtypes=("bfloat16",))
    yield Sample("odd_pages", {**base, "page": 24, "lens": ((1, 60),)}, tags=edge, dtypes=("bfloat16",))
    below = {**base, "lens": ((1, 2), (2, 19)), "below_zero": True}  # a running maximum that starts at 0 is too high
    yield Sample("below_zero", below, tags=edge, dtypes=("bfloat16",))
    codes = {**base, "K": 1, "format": "fp8_656", "lens": ((1, 1), (7, 30)), "codes": True}
    yield Sample("codes-fp8_656", codes, fill="exact", dtypes=("bfloat16",))
    # What was chosen is nobody's business here: in no order, and keys that a causal mask would hide.
    freely = {**base, "lens": ((3, 20), (4, 2)), "freely": True}
    yield Sample("any_order_any_key", freely, tags=edge, dtypes=("bfloat16",))
    tiles = {**base, "K": 193, "lens": ((3, 21),), "far_apart": True}
    yield Sample("empty_tiles", tiles, tags=edge, dtypes=("bfloat16",))
    for fmt in formats("latent"):
        broken = {**base, "lens": ((2, 9), (1, 20), (1, 12)), "format": fmt, "broken": True}
        yield Sample(f"broken_rows-{fmt}", broken, tags=edge, dtypes=("bfloat16",))
    # Pages whose number takes more than 16 bits; scores that float16 holds once they are scaled, but not before.
    far = {**base, "L": 16, "R": 4, "page": 1, "lens": ((1, 5), (2, 9)), "spare": 70_000}
    yield Sample("far_pages", far, tags=edge, dtypes=("bfloat16",))
    large = {**base, "lens": ragged, "q_scale": 2.0**13, "scale": 0.07 / 2**13}
    yield Sample("large_raw_scores", large, tags=edge, dtypes=("float16",))
    yield Sample("empty_rows", {**base, "lens": ((0, 9), (2, 30), (3, 0), (0, 0))}, tags=edge)
    yield Sample("interleaved_invalid", {**base, "lens": ragged, "holes": True}, tags=edge)
    yield Sample("no_tokens", {**base, "lens": ((0, 9),)}, tags=edge)
    yield Sample("many_heads", {**base, "H": 96, "lens": ((2, 33),)})
    yield Sample("peaked", {**base, "lens": ragged, "q_scale": 8.0})
    yield Sample("uniform", {**base, "K": 64, "lens": ((2, 161), (1, 80))}, fill="exact")
    cancelling = {**base, "H": 1, "K": 512, "page": 1, "lens": ((1, 512),), "cancelling": True}
    yield Sample("cancelling", cancelling, fill="exact", dtypes=("bfloat16",))
    for batch, lens in (
        ("decode-b1-64k", ((1, 70000),)),
        ("decode-b4-mtp", ((2, 4097), (1, 2048), (4, 2049), (1, 63))),
    ):
        yield Sample(
            f"glm5-{batch}", {**GLM5, "lens": lens, "page": 64, "format": "latent_576"}, "standard",
            tags=frozenset({"glm5"}), dtypes=("bfloat16", "float32"),
        )  # fmt: skip
    for fmt in ("latent_512_rope_64", "fp8_656"):
        yield Sample(
            f"glm5-decode-{fmt}", {**GLM5, "lens": ((1, 4096), (2, 4097)), "page": 64, "format": fmt}, "standard",
            tags=frozenset({"glm5"}), dtypes=("bfloat16",),
        )  # fmt: skip
    yield Sample(
        "glm5-prefill", {**GLM5, "lens": ((24, 4096),), "page": 64, "format": "latent_576"}, "standard",
        tags=frozenset({"glm5"}), dtypes=("bfloat16",),
    )  # fmt: skip
    yield Sample(
        "dsv32-decode", {**GLM5, "H": 128, "scale": 0.135234, "lens": ((1, 4096),), "page": 64, "format": "latent_576"},
        "standard", dtypes=("bfloat16",),
    )  # fmt: skip


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    H, L, R, K = (axes[a] for a in "HLRK")
    made = latents(sample, dtype, draw)
    T = made.batch.tokens
    q = draw.normal(T, H, L + R, dtype=dtype, scale=axes.get("q_scale", 1.0))
    if sample.fill == "exact":  # equal scores over a power of two of keys: the average is exact in fp32
        q = torch.zeros_like(q)
    if axes.get("below_zero"):
        q = pushed_down(q, axes["scale"])
    lengths = [s for n, s in made.batch.lens for _ in range(n)]
    indices = torch.full((T, K), -1, dtype=torch.int32)
    for t, seen in enumerate(made.batch.visible().tolist()):
        chosen = draw.permutation(lengths[t] if axes.get("freely") else seen)[:K].int()
        if not axes.get("freely"):
            chosen = chosen.sort().values
        places = draw.permutation(K)[: len(chosen)].sort().values if axes.get("holes") else torch.arange(len(chosen))
        if axes.get("far_apart"):  # at the end; of every other token, the first one at the beginning
            places = places + K - len(chosen)
            places[0] = places[0] if t % 2 else 0
        indices[t, places] = chosen
    if axes.get("holes") and T > 1:
        indices[1] = -1  # a token that chose nothing, of a request that has keys
    return Inputs({"q": q, "indices": indices, **made.args}, made.poison)


def fuzz(pick: Pick) -> Sample:
    axes = {**TINY, "H": pick.integer(1, 70), "L": 128 * pick.integer(1, 3), "K": pick.integer(1, 130)}
    lens = pick.lens(requests=5, new=9, keys=300)
    paged = {"lens": lens, "page": pick.of((8, 1, 16, 64)), "format": pick.of(formats("latent"))}
    return Sample("fuzz", {**axes, **paged, "holes": pick.of((False, True))}, tags=frozenset({"empty"}))


def cost(axes: Mapping[str, Any]) -> Cost:
    T, H, L, R, K = axes["T"], axes["H"], axes["kv_lora_rank"], axes["W"] - axes["kv_lora_rank"], axes["K"]
    cached, rows = T * K * (axes["cache_row"] + 4), T * H * (axes["itemsize"] * (2 * L + R) + 4)
    return Cost(flops=2 * T * K * H * (2 * L + R), bytes=cached + rows)


def _index_past_end(args: dict[str, Any]) -> dict[str, Any]:
    args["indices"] = args["indices"].clone()
    args["indices"][0, 0] = int(args["seq_lens"][0])
    return args


SPEC = OpSpec(
    name="sparse_mla",
    group="dsa",
    reference=sparse_mla,
    args=(
        Arg("q", "T H W", "F", "absorbed queries: kv_lora_rank latent dims, then the rope dims"),
        KV_CACHE,
        Arg("indices", "T K", "int32", "key positions local to the request, -1 for none"),
        *BATCH,
        ROPE_CACHE,
    ),
    scalars=(
        Scalar("scale", "softmax scale: 0.0625 for GLM-5 (256^-0.5, not 576^-0.5)"),
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
        "out": Calibrated(depth=("W",), amplify=score_amplification),
        "lse": AbsoluteError(depth=("W",), amplify=score_amplification),
    },
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(BadInput("index_past_end", "VALUE", _index_past_end),),
    source="spec 3.2, 3.3, 6.1, 14.2, 14.8",
)
