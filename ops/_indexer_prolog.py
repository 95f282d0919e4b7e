"""indexer_prolog: from the hidden state to index queries, head weights and a written index cache.

Legend: T tokens, E hidden size, Q q_lora_rank, H = num_heads index heads, D index head dim, I = R/2 half the rope
dims, N pages, P page size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import checks, gains, writes
from glm5_hal.ops._common.draws import weight, weight_scale
from glm5_hal.ops._common.indexer import INDEX_CACHE, INDEX_SCALARS, index_constraints
from glm5_hal.ops._common.precision import down, linear, up
from glm5_hal.ops._common.prolog import LAYOUT, ROPE_TABLES, WEIGHT_FORMAT
from glm5_hal.ops._common.references import loosest
from glm5_hal.ops._rope import LAYOUTS, unit_tables
from glm5_hal.spec import (
    FLOATS,
    Arg,
    BadInput,
    CacheContents,
    Calibrated,
    Constraint,
    Cost,
    Draw,
    Inputs,
    OpSpec,
    Out,
    Pick,
    Sample,
    Scalar,
)


def indexer_prolog(
    ops: Any,
    x: Tensor,
    q_c: Tensor,
    w_q_b: Tensor,
    w_k: Tensor,
    k_norm_weight: Tensor,
    k_norm_bias: Tensor,
    w_weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    index_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    weights_scale: float,
    eps: float = 1e-6,
    layout: str = "interleaved",
    hadamard: bool = False,
    cache_format: str = "bf16_128",
    weight_format: str = "plain",
) -> tuple[Tensor, Tensor]:
    """Everything of the lightning indexer before its scores; ``x`` is already input-layernormed.

    q = W_q q_c, per head, from the *normed* query latent that `mla_prolog` returns; k = layer_norm(W_k x), with bias,
    one head for all. Rope turns the FIRST R dims of both, the rest passes: the other way round than in the main
    attention. ``layout`` is "interleaved" for GLM-5 and "half" for DeepSeek-V3.2, whose main attention is interleaved.
    With ``hadamard`` both are then multiplied by the Hadamard matrix times D^-0.5; a cache that is written so can only
    be read so. k goes into the index cache as `index_cache_write` stores it: always, also where all keys will be
    selected anyway.

    weights = W_w x · ``weights_scale`` in fp32, never rounded to the activations' dtype; they may be negative.
    ``weights_scale`` is num_heads^-0.5 · D^-0.5: the scale of the scores is folded in here and nowhere else.
    """
    T, D, R = x.shape[0], w_k.shape[0], 2 * cos.shape[-1]
    q = linear(q_c, w_q_b).view(T, num_heads, D)
    k = layer_norm(linear(x, w_k), k_norm_weight, k_norm_bias, eps)
    q, k = (torch.cat([ops.rope(v[..., :R], cos, sin, layout=layout), v[..., R:]], -1) for v in (q, k))
    if hadamard:
        q, k = (ops.hadamard(v, scale=D**-0.5) for v in (q, k))
    ops.index_cache_write(k, index_cache, slot_mapping, cache_format=cache_format)
    x_up = up(x)
    return q, x_up @ w_weights.to(x_up.dtype).T * weights_scale


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias over the last dim, in fp32, rounded once."""
    centred = up(x) - up(x).mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return down(normed * up(weight) + up(bias), x)


def check_values(args: Mapping[str, Any]) -> None:
    checks.slots("indexer_prolog", args["slot_mapping"], args["index_cache"])


GLM5 = {"T": 16, "E": 6144, "Q": 2048, "H": 32, "D": 128, "R": 64, "N": 3, "page": 64}
DSV32 = {**GLM5, "E": 7168, "Q": 1536, "H": 64, "layout": "half", "hadamard": True}
TINY = {"T": 11, "E": 80, "Q": 48, "H": 5, "D": 128, "R": 32, "N": 4, "page": 8}


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    for fmt in formats("index"):
        yield Sample(f"tokens-{fmt}", {**TINY, "format": fmt})
        yield Sample(f"half_hadamard-{fmt}", {**TINY, "layout": "half", "hadamard": True, "format": fmt})
    base = {**TINY, "format": "bf16_128"}
    yield Sample("float32_weights", {**base, "weights": "float32", "norms": "float32"})
    yield Sample("interleaved_hadamard", {**base, "hadamard": True}, dtypes=("bfloat16",))  # as in GLM-5
    wide = {"weights": "float32", "norms": "float32", "hadamard": True}
    yield Sample("float32_weights-fp8_132", {**TINY, **wide, "format": "fp8_132"}, dtypes=("bfloat16", "float16"))
    yield Sample("small_keys", {**base, "size": 2.0**-9}, tags=edge)  # eps counts
    odd = {"size": 2.0**-9, "eps": 3e-4, "weights_scale": 0.3}
    yield Sample("another_eps", {**base, **odd}, tags=edge, dtypes=("bfloat16",))
    # Keys far from zero beside their spread: a variance as the difference of two mean squares has few digits left.
    yield Sample("far_mean", {**base, "far_mean": True}, tags=edge, dtypes=("float32",))
    yield Sample("many_rows", {**base, "T": 40, "N": 8}, dtypes=("bfloat16",))
    yield Sample("all_rope", {**base, "D": 24, "R": 24}, tags=edge)
    yield Sample("all_skipped", {**base, "skip": "all"}, tags=edge)
    yield Sample("no_tokens", {**base, "T": 0}, tags=edge)
    for fmt, dtypes in (("bf16_128", ("bfloat16", "float32")), ("fp8_132", ("bfloat16",))):
        yield Sample(f"glm5-{fmt}", {**GLM5, "format": fmt}, "standard", tags=glm5, dtypes=dtypes)
    yield Sample("dsv32-fp8_132", {**DSV32, "format": "fp8_132"}, "standard", dtypes=("bfloat16",))


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    T, E, Q, H, D, R = (axes[a] for a in "TEQHDR")
    fmt, norms = FORMATS[axes["format"]], axes.get("norms", dtype)
    cos, sin = unit_tables(draw, T, R // 2)
    size = axes.get("size", 1.0) * 2.0 ** draw.integers(-1, 2, T, 1)
    w_k = weight(draw, D, E, dtype)
    if axes.get("far_mean"):
        w_k += 64 * weight(draw, 1, E, dtype)
    args = {
        "x": draw.normal(T, E, dtype=dtype) * size.to(getattr(torch, dtype)),
        "q_c": draw.normal(T, Q, dtype=dtype),
        "w_q_b": weight(draw, H * D, Q, dtype),
        "w_k": w_k,
        "k_norm_weight": draw.uniform(D, dtype=norms, low=0.5, high=1.5),
        "k_norm_bias": draw.uniform(D, dtype=norms, low=-0.5, high=0.5),
        "w_weights": draw.normal(H, E, dtype=axes.get("weights", dtype), scale=weight_scale(E)),
        "cos": cos,
        "sin": sin,
        "slot_mapping": writes.slots(draw, T, axes["N"] * axes["page"], skipped=axes.get("skip", "some")),
        "num_heads": H,
        "weights_scale": axes.get("weights_scale", (H * D) ** -0.5),
        "eps": axes.get("eps", 1e-6),
        "layout": axes.get("layout", "interleaved"),
        "hadamard": axes.get("hadamard", False),
        "cache_format": fmt.name,
        "weight_format": "plain",
        **writes.held(draw, fmt, axes["N"], axes["page"], (D,), dtype),
    }
    return Inputs(args)


def fuzz(pick: Pick) -> Sample:
    sizes = {"T": pick.integer(0, 30), "E": pick.integer(1, 120), "Q": pick.integer(1, 80), "H": pick.integer(1, 6)}
    how = {"R": 2 * pick.integer(1, 64), "hadamard": pick.of((False, True)), "layout": pick.of(LAYOUTS)}
    stored = {"format": pick.of(formats("index")), "skip": pick.of(("some", "none", "all"))}
    return Sample("fuzz", {**TINY, **sizes, **how, **stored})


def cost(axes: Mapping[str, Any]) -> Cost:
    T, E, Q, H, D = axes["T"], axes["E"], axes["Q"], axes["num_heads"], axes["D"]
    weights = H * D * Q + (D + H) * E
    activations = axes["itemsize"] * (E + Q + H * D) + 4 * H
    return Cost(flops=2 * T * weights, bytes=axes["itemsize"] * weights + T * (activations + axes["cache_row"]))


def _rope_fits(known: Mapping[str, Any]) -> bool:
    return bool(2 * known["I"] <= known["D"])


def _power_of_two(known: Mapping[str, Any]) -> bool:
    return not known["hadamard"] or known["D"] & (known["D"] - 1) == 0


SPEC = OpSpec(
    name="indexer_prolog",
    group="dsa",
    composite=True,
    own_products=True,
    reference=indexer_prolog,
    emulate=loosest(indexer_prolog),
    args=(
        Arg("x", "T E", "F", "hidden states, after the layer's input norm"),
        Arg("q_c", "T Q", "F", "the normed query latent, from mla_prolog"),
        Arg("w_k", "D E", "F", "indexer.wk"),
        Arg("w_q_b", "num_heads*D Q", "F", "indexer.wq_b: per head rope rows, then the others"),
        Arg("k_norm_weight", "D", "W", "gain of indexer.k_norm, in the activations' dtype or float32"),
        Arg("k_norm_bias", "D", "W", "bias of indexer.k_norm, in its gain's dtype"),
        Arg("w_weights", "num_heads E", "V", "indexer.weights_proj, in the activations' dtype or float32"),
        *ROPE_TABLES,
        INDEX_CACHE,
        writes.SLOTS,
    ),
    scalars=(
        Scalar("num_heads", "index heads: 32 for GLM-5, 64 for DeepSeek-V3.2", low=1),
        Scalar("weights_scale", "factor of the head weights: num_heads^-0.5 · D^-0.5"),
        Scalar("eps", "of the key's layer norm, 1e-6", low=0.0),
        LAYOUT,
        Scalar("hadamard", "whether queries and keys are turned by the Hadamard matrix, D a power of two"),
        *INDEX_SCALARS,
        WEIGHT_FORMAT,
    ),
    outs=(
        Out("q", "T num_heads D", "F", "index queries"),
        Out("weights", "T num_heads", "acc", "head weights, scaled"),
    ),
    mutates=("index_cache",),
    dtypes={"F": FLOATS, "W": FLOATS, "V": FLOATS, "A": ("float32", "float64"), "C": (*FLOATS, "uint8")},
    constraints=(
        *index_constraints("x"),
        gains.as_wide("k_norm_weight", "k_norm_bias", "w_weights"),
        Constraint(
            "the rope dims, twice the width of cos, fit into D", _rope_fits, "pass cos and sin as [T, R/2], R <= D"
        ),
        Constraint("hadamard needs a D that is a power of two", _power_of_two, "pass hadamard=False"),
    ),
    rounding="q, the projected key, its norm, rope and Hadamard accumulate in fp32 and are rounded to F each; a kernel "
    "that keeps more of these in fp32 is closer to the truth; weights stay in fp32; stored as index_cache_write does",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={
        "q": Calibrated(depth=("Q", "D")),
        "weights": Calibrated(depth=("E",)),
        "index_cache": CacheContents("index", depth=("E", "D")),
    },
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        *writes.slot_errors("index_cache"),
        *gains.errors("k_norm_weight", "w_weights"),
        BadInput("num_heads_wrong", "SHAPE", lambda args: {**args, "num_heads": args["num_heads"] + 1}),
        BadInput("eps_negative", "SCALAR", lambda args: {**args, "eps": -1e-6}),
        BadInput("layout_unknown", "SCALAR", lambda args: {**args, "layout": "neox"}),
    ),
    source="spec 4.1, 4.2, 4.5, 4.7",
)
