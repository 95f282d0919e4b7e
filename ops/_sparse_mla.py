"""sparse_mla: attention of every token over the keys that its own indices name, in the absorbed form.

Legend: T tokens, H heads, L kv_lora_rank, R rope dim, W = L+R, K indices per token, B requests, M pages per request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import caches, checks
from glm5_hal.ops._common.attention import KV_CACHE, ROPE_CACHE, attend, cache_constraints, score_amplification
from glm5_hal.ops._common.latents import latents
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
        yield Sample(f"two_groups-{fmt}", {**TINY, "L": 256, "lens": ragged, "page": 8, "format": fmt})
    base = {**TINY, "page": 8, "format": "latent_576"}
    edge = frozenset({"edge"})
    yield Sample("many_keys", {**base, "K": 1100, "lens": ((1, 1300), (2, 300))})  # more than a tile or a split of them
    yield Sample("far_peak", {**base, "K": 1100, "lens": ((1, 1100),), "q_scale": 128.0}, tags=edge)
    yield Sample("prefill", {**base, "lens": ((37, 37), (20, 50))})
    yield Sample("empty_rows", {**base, "lens": ((0, 9), (2, 30), (3, 0), (0, 0))}, tags=edge)
    yield Sample("interleaved_invalid", {**base, "lens": ragged, "holes": True}, tags=edge)
    yield Sample("no_tokens", {**base, "lens": ((0, 9),)}, tags=edge)
    yield Sample("many_heads", {**base, "H": 40, "lens": ((2, 33),)})
    yield Sample("peaked", {**base, "lens": ragged, "q_scale": 8.0})
    yield Sample("uniform", {**base, "K": 64, "lens": ((2, 161), (1, 80))}, fill="exact")
    for batch, lens in (
        ("decode-b1-64k", ((1, 65536),)),
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
    indices = torch.full((T, K), -1, dtype=torch.int32)
    for t, seen in enumerate(made.batch.visible().tolist()):
        chosen = draw.permutation(seen)[:K].sort().values.int()
        places = draw.permutation(K)[: len(chosen)].sort().values if axes.get("holes") else torch.arange(len(chosen))
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
