"""mla_prolog: from the hidden state to absorbed queries and a written latent cache.

Legend: T tokens, E hidden size, Q q_lora_rank, H heads, K nope dims per head, L kv_lora_rank, I = R/2 half the rope
dims, N pages, P page size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import checks, gains, writes
from glm5_hal.ops._common.attention import KV_CACHE, ROPE_CACHE, cache_constraints
from glm5_hal.ops._common.draws import cancelling, mirrored, weight
from glm5_hal.ops._common.precision import linear, matmul
from glm5_hal.ops._common.prolog import LAYOUT, ROPE_TABLES, WEIGHT_FORMAT
from glm5_hal.ops._common.references import loosest
from glm5_hal.ops._rope import LAYOUTS, unit_tables
from glm5_hal.spec import (
    FLOATS,
    Arg,
    BadInput,
    CacheContents,
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


def mla_prolog(
    ops: Any,
    x: Tensor,
    w_q_a: Tensor,
    q_a_norm: Tensor,
    w_q_b: Tensor,
    w_kv_a: Tensor,
    kv_a_norm: Tensor,
    w_uk: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    rope_cache: Tensor | None = None,
    *,
    eps: float,
    layout: str = "interleaved",
    cache_format: str = "latent_576",
    weight_format: str = "plain",
) -> tuple[Tensor, Tensor]:
    """Everything of MLA before the attention itself, in the absorbed form; ``x`` is already input-layernormed.

    q_c = rms_norm(W_qa x); per head, W_qb q_c is nope (K dims) then rope (R dims); q[t,h] = (q_nope W_UK^h) ⊕
    rope(q_rope), L + R dims. W_kva x is the latent (L) then the rope key (R): the cache slot of token t gets
    rms_norm(latent) and rope(rope key), which is not normed. Both norms use ``eps``: 1e-5 as GLM-5 was trained, 1e-6
    in transformers and for DeepSeek-V3.2.

    ``w_uk[h]`` holds the k_nope rows of head h of kv_b_proj (viewed as [H, K + Dv, L]: the first K). ``q_c`` is what
    the indexer needs. ``cos`` and ``sin`` are the tables of each token's own position, for rope of ``layout``;
    slots, -1 and the formats' bytes are those of `mla_cache_write`. A token without a slot still gets its query.
    """
    (H, K, L), T, R = w_uk.shape, x.shape[0], 2 * cos.shape[-1]
    q_c = ops.rms_norm(linear(x, w_q_a), q_a_norm, eps=eps)
    q_nope, q_rope = linear(q_c, w_q_b).view(T, H, K + R).tensor_split([K], -1)
    absorbed = matmul(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
    q_pe = ops.rope(q_rope, cos, sin, layout=layout)
    latent, k_rope = linear(x, w_kv_a).tensor_split([L], -1)
    kv_c = ops.rms_norm(latent, kv_a_norm, eps=eps)
    k_pe = ops.rope(k_rope, cos, sin, layout=layout)
    ops.mla_cache_write(kv_c, k_pe, kv_cache, slot_mapping, rope_cache, cache_format=cache_format)
    return torch.cat([absorbed, q_pe], -1), q_c


def check_values(args: Mapping[str, Any]) -> None:
    checks.slots("mla_prolog", args["slot_mapping"], args["kv_cache"])


GLM5 = {"T": 16, "E": 6144, "Q": 2048, "H": 64, "K": 192, "L": 512, "R": 64, "N": 3, "page": 64, "eps": 1e-5}
DSV32 = {**GLM5, "E": 7168, "Q": 1536, "H": 128, "K": 128, "eps": 1e-6}
TINY = {"T": 11, "E": 80, "Q": 48, "H": 3, "K": 24, "L": 128, "R": 16, "N": 4, "page": 8, "eps": 1e-5}


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    for fmt in formats("latent"):
        yield Sample(f"tokens-{fmt}", {**TINY, "format": fmt})
        half = ("bfloat16",) if fmt != "latent_576" else ("float32", "bfloat16", "float16")
        yield Sample(f"half_layout-{fmt}", {**TINY, "layout": "half", "format": fmt}, dtypes=half)
    base = {**TINY, "format": "latent_576"}
    yield Sample("small_latents", {**base, "size": 2.0**-9, "eps": 1e-6}, tags=edge)  # eps counts
    yield Sample("another_eps", {**base, "size": 2.0**-9, "eps": 3e-4}, tags=edge, dtypes=("bfloat16",))
    many = {**base, "T": 40, "N": 8}
    norms = {"norms": "float32", "size": 2.0**-3}  # few of a row's digits are the rope's, which is not normed
    yield Sample("float32_norms", {**many, **norms})
    yield Sample("float32_norms-fp8_656", {**base, **norms, "format": "fp8_656"}, dtypes=("bfloat16",))
    yield Sample("many_rows", {**many, "H": 12}, dtypes=("bfloat16",))
    yield Sample("cancelling", {**base, "cancelling": True})
    yield Sample("one_head", {**base, "T": 1, "H": 1}, tags=edge)
    yield Sample("all_skipped", {**base, "skip": "all"}, tags=edge)
    yield Sample("no_tokens", {**base, "T": 0}, tags=edge)
    yield Sample("glm5", {**GLM5, "format": "latent_576"}, "standard", tags=glm5, dtypes=("bfloat16", "float32"))
    for fmt in ("latent_512_rope_64", "fp8_656"):
        yield Sample(f"glm5-{fmt}", {**GLM5, "T": 3, "format": fmt}, "standard", tags=glm5, dtypes=("bfloat16",))
    yield Sample("dsv32", {**DSV32, "format": "latent_576"}, "standard", dtypes=("bfloat16",))


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    T, E, Q, H, K, L, R = (axes[a] for a in "TEQHKLR")
    fmt, wide = FORMATS[axes["format"]], axes.get("norms") == "float32"
    cos, sin = unit_tables(draw, T, R // 2)
    # Tokens differ in size by powers of two, so that a norm taken from another token shows.
    size = axes.get("size", 1.0) * 2.0 ** draw.integers(-1, 2, T, 1)
    args = {
        "x": draw.normal(T, E, dtype=dtype) * size.to(getattr(torch, dtype)),
        "w_q_a": weight(draw, Q, E, dtype),
        "q_a_norm": gains.wide(draw, Q, dtype) if wide else draw.uniform(Q, dtype=dtype, low=0.5, high=1.5),
        "w_q_b": weight(draw, H * (K + R), Q, dtype),
        "w_kv_a": weight(draw, L + R, E, dtype),
        "kv_a_norm": gains.wide(draw, L, dtype) if wide else draw.uniform(L, dtype=dtype, low=0.5, high=1.5),
        "w_uk": weight(draw, H * L, K, dtype).view(H, L, K).transpose(1, 2).contiguous(),
        "cos": cos,
        "sin": sin,
        "slot_mapping": writes.slots(draw, T, axes["N"] * axes["page"], skipped=axes.get("skip", "some")),
        "eps": axes["eps"],
        "layout": axes.get("layout", "interleaved"),
        "cache_format": fmt.name,
        "weight_format": "plain",
        **writes.held(draw, fmt, axes["N"], axes["page"], (L, R), dtype),
    }
    if axes.get("cancelling"):  # the first projections' sums are exact, in fp32
        args["x"] = mirrored(draw, T, E, dtype)
        args["w_q_a"], args["w_kv_a"] = cancelling(draw, Q, E, dtype), cancelling(draw, L + R, E, dtype)
    return Inputs(args)


def fuzz(pick: Pick) -> Sample:
    sizes = {"T": pick.integer(0, 30), "E": pick.integer(1, 120), "Q": pick.integer(1, 80), "H": pick.integer(1, 6)}
    heads = {"K": pick.integer(1, 40), "L": 128 * pick.integer(1, 2), "R": 2 * pick.integer(1, 12)}
    how = {"format": pick.of(formats("latent")), "layout": pick.of(LAYOUTS), "skip": pick.of(("some", "none", "all"))}
    return Sample("fuzz", {**TINY, **sizes, **heads, **how})


def cost(axes: Mapping[str, Any]) -> Cost:
    T, E, Q, H, K, L, R = (*(axes[a] for a in "TEQHKL"), 2 * axes["I"])
    weights = Q * E + H * (K + R) * Q + (L + R) * E + H * K * L
    activations = axes["itemsize"] * (E + Q + H * (L + R))
    return Cost(flops=2 * T * weights, bytes=axes["itemsize"] * weights + T * (activations + axes["cache_row"]))


SPEC = OpSpec(
    name="mla_prolog",
    group="mla",
    composite=True,
    own_products=True,
    reference=mla_prolog,
    emulate=loosest(mla_prolog),
    args=(
        Arg("x", "T E", "F", "hidden states, after the layer's input norm"),
        Arg("w_q_a", "Q E", "F", "q_a_proj"),
        Arg("q_a_norm", "Q", "W", "gain of q_a_layernorm, in the activations' dtype or float32"),
        Arg("w_uk", "H K L", "F", "kv_b_proj's k_nope rows, per head"),
        *ROPE_TABLES,
        Arg("w_q_b", "H*(K+2*I) Q", "F", "q_b_proj: per head nope rows, then rope rows"),
        Arg("w_kv_a", "L+2*I E", "F", "kv_a_proj_with_mqa: latent rows, then rope rows"),
        Arg("kv_a_norm", "L", "W", "gain of kv_a_layernorm, in q_a_norm's dtype"),
        KV_CACHE,
        writes.SLOTS,
        ROPE_CACHE,
    ),
    scalars=(
        Scalar("eps", "of both latents' norms: 1e-5 as trained, 1e-6 in transformers", low=0.0),
        LAYOUT,
        Scalar("cache_format", "named cache format", choices=formats("latent")),
        WEIGHT_FORMAT,
    ),
    outs=(
        Out("q", "T H L+2*I", "F", "absorbed queries: latent part, then rope part"),
        Out("q_c", "T Q", "F", "the normed query latent"),
    ),
    mutates=("kv_cache", "rope_cache"),
    dtypes={"F": FLOATS, "W": FLOATS, "A": ("float32", "float64"), "C": (*FLOATS, "uint8")},
    constraints=(*cache_constraints("L", "2*I", "x"), gains.as_wide("q_a_norm", "kv_a_norm")),
    rounding="each projection, the absorbed query, each norm and each rope accumulates in fp32 and is rounded to F; "
    "a kernel that keeps more of these in fp32 is closer to the truth; stored as mla_cache_write does",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={
        "q": Calibrated(depth=("E", "Q", "K")),
        "q_c": Calibrated(depth=("E", "Q")),
        "kv_cache": CacheContents("latent", depth=("E", "L")),
        "rope_cache": CacheContents("latent", depth=("E", "L")),
    },
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        *writes.slot_errors("kv_cache"),
        *gains.errors("q_a_norm", "kv_a_norm"),
        BadInput("eps_negative", "SCALAR", lambda args: {**args, "eps": -1e-6}),
        BadInput("layout_unknown", "SCALAR", lambda args: {**args, "layout": "neox"}),
    ),
    source="spec 2.1, 2.2, 3.1, 3.2, 12",
)
