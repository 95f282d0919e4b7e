"""moe_experts: routed experts from tokens to tokens.

Legend: T tokens, K experts per token, D hidden size, I intermediate size of an expert, E experts here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common import checks
from glm5_hal.ops._common.draws import mirrored
from glm5_hal.ops._common.prolog import WEIGHT_FORMAT
from glm5_hal.ops._common.references import loosest
from glm5_hal.ops._grouped_gemm import expert_weights
from glm5_hal.ops._moe_combine import exact_weights, router_weights
from glm5_hal.ops._moe_permute import chosen_experts
from glm5_hal.ops._silu_and_mul import LIMIT
from glm5_hal.spec import FLOATS, Arg, BadInput, Calibrated, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample, Scalar


def moe_experts(
    ops: Any,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared: Tensor | None = None,
    *,
    limit: float | None = None,
    weight_format: str = "plain",
) -> Tensor:
    """out[t] = Σ_k topk_weights[t, k] · w_down[e] (silu(gate) · up) + shared[t], where e = topk_ids[t, k].

    gate ‖ up = w_gate_up[e] x[t].
    ``w_gate_up`` holds the gate's rows first, then up's. Id −1 is an expert of another rank: it contributes nothing,
    and its weight is not read. Weights include routed_scaling_factor; ``shared``, the shared expert's result, is added
    unscaled. ``limit`` clamps as in silu_and_mul. Made of moe_permute, grouped_gemm, silu_and_mul, grouped_gemm and
    moe_combine; a fused kernel need not build the permuted tokens.
    """
    rows, offsets, inverse = ops.moe_permute(x, topk_ids, num_experts=w_down.shape[0])
    hidden = ops.grouped_gemm(rows, w_gate_up, offsets, weight_format=weight_format)
    hidden = ops.silu_and_mul(hidden, limit=limit)
    result = ops.grouped_gemm(hidden, w_down, offsets, weight_format=weight_format)
    return ops.moe_combine(result, topk_weights, inverse, shared)  # type: ignore[no-any-return]


def check_values(args: Mapping[str, Any]) -> None:
    n = args["w_down"].shape[0]
    checks.in_range("moe_experts", "topk_ids", args["topk_ids"], -1, n, f"there are {n} experts, -1 is none of them")


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    tiny = {"T": 13, "K": 3, "D": 64, "I": 40, "E": 7}
    yield Sample("tokens", tiny)
    yield Sample("elsewhere", {**tiny, "elsewhere": 5})
    yield Sample("with_shared", {**tiny, "elsewhere": 4, "shared": True})
    yield Sample("clamped", {**tiny, "limit": 0.75, "shared": True})
    yield Sample("integers", {**tiny, "elsewhere": 2}, fill="exact")
    yield Sample("nothing_here", {**tiny, "elsewhere": 8, "T": 1, "shared": True}, tags=edge)
    yield Sample("idle_experts", {**tiny, "T": 2, "E": 70, "D": 24, "I": 16}, tags=edge)  # more experts than dims
    yield Sample("one_expert", {**tiny, "K": 1, "E": 1}, tags=edge)
    yield Sample("no_experts", {**tiny, "E": 0, "elsewhere": 8, "shared": True}, tags=edge)
    yield Sample("no_tokens", {**tiny, "T": 0, "shared": True}, tags=edge)
    yield Sample("many_rows", {**tiny, "T": 40, "K": 1, "E": 1}, dtypes=("bfloat16",))
    yield Sample("many_slots", {**tiny, "T": 5, "K": 9, "E": 12}, dtypes=("bfloat16",))
    yield Sample("repeated_expert", {**tiny, "repeat": True}, tags=edge, dtypes=("bfloat16",))
    # One rank of EP32, as a low-latency dispatch delivers: one copy of a token for each of its experts here.
    glm = {"D": 6144, "I": 2048}
    yield Sample("glm5-ep32", {**glm, "T": 64, "K": 1, "E": 8}, "standard", tags=glm5, dtypes=("bfloat16",))
    yield Sample(
        "glm5-three-experts", {**glm, "T": 8, "K": 2, "E": 3, "elsewhere": 2, "shared": True}, "standard", tags=glm5,
        dtypes=("float32",),
    )  # fmt: skip


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    T, K, D, I, E = (axes[a] for a in "TKDIE")  # noqa: E741 - the letters of the legend
    ids = chosen_experts(draw, T, K, E, axes.get("elsewhere", 0), repeat=axes.get("repeat", False))
    unread = (ids < 0).all(1, keepdim=True).expand(T, D)
    if sample.fill == "exact":
        x, w_gate_up, w_down = _integers(draw, T, D, I, E, dtype)
        weights = exact_weights(draw, T, K)
    else:
        x, weights = draw.normal(T, D, dtype=dtype), router_weights(draw, T, K)
        w_gate_up, w_down = (expert_weights(draw, E, *dims, dtype=dtype) for dims in ((2 * I, D), (D, I)))
    args = {
        "x": x.masked_fill(unread, 77.0),
        "topk_weights": weights.masked_fill(ids < 0, 77.0),
        "topk_ids": ids,
        "w_gate_up": w_gate_up,
        "w_down": w_down,
        "shared": draw.normal(T, D, dtype=dtype) if axes.get("shared") else None,
        "limit": axes.get("limit"),
        "weight_format": "plain",
    }
    return Inputs(args, {"x": unread, "topk_weights": ids < 0})


def _integers(draw: Draw, T: int, D: int, I: int, E: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """Tokens and weights that are exact throughout, whether or not a kernel stores what lies between: a gate is 32 or
    −128, where the sigmoid is 1 or 0; up is a small positive integer; so is a result, times 32. All of them are what
    large sums leave (see `cancelling`)."""

    def leaving(rows: int, inputs: int, left: Tensor) -> Tensor:
        first = 1.0 + draw.integers(0, 31, rows, inputs // 2)
        return torch.cat([first, left - first], -1).view(E, -1, inputs)

    def picking(rows: int, inputs: int, value: Tensor) -> Tensor:
        """One input of the first half each, times a value."""
        return torch.zeros(rows, inputs // 2).scatter_(1, draw.integers(0, inputs // 2, rows, 1), value)

    x = mirrored(draw, T, D, "float32")
    x[:, [0, D // 2]] = 1.0
    first = torch.zeros(E * I // 2, D // 2)
    first[:, 0] = torch.where(draw.integers(0, 3, len(first)) > 0, 32.0, -128.0)
    gate = leaving(len(first), D, first)
    up = leaving(len(first), D, picking(len(first), D, torch.ones(len(first), 1)))
    # The hidden state repeats itself too: both halves of gate and up do.
    w_gate_up = torch.cat([gate, gate, up, up], 1)
    w_down = leaving(E * D, I, picking(E * D, I, 1.0 - 2.0 * draw.integers(0, 2, E * D, 1)))
    kind = getattr(torch, dtype)
    return x.to(kind), w_gate_up.to(kind), w_down.to(kind)


def fuzz(pick: Pick) -> Sample:
    experts = pick.integer(1, 12)
    axes = {"T": pick.integer(0, 30), "K": pick.integer(1, min(6, experts)), "D": pick.integer(1, 90), "E": experts}
    how = {"elsewhere": pick.integer(0, 8), "shared": pick.of((False, True)), "limit": pick.of((None, 0.75))}
    return Sample("fuzz", {**axes, "I": pick.integer(1, 60), **how}, tags=frozenset({"empty"}))


def cost(axes: Mapping[str, Any]) -> Cost:
    """Counts every slot as an expert that is here."""
    T, K, D, I, E = (axes[a] for a in "TKDIE")  # noqa: E741
    touched = min(E, T * K)
    return Cost(flops=6 * T * K * D * I, bytes=axes["itemsize"] * (3 * touched * D * I + 2 * T * D) + 8 * T * K)


def _with_id(value: int) -> Any:
    def spoil(args: dict[str, Any]) -> dict[str, Any]:
        args["topk_ids"] = torch.full_like(args["topk_ids"], value)
        return args

    return spoil


SPEC = OpSpec(
    name="moe_experts",
    group="moe",
    composite=True,
    reference=moe_experts,
    emulate=loosest(moe_experts),
    args=(  # w_down first: it binds I
        Arg("x", "T D", "F", "tokens"),
        Arg("topk_weights", "T K", "A", "router weights, scaling factor included"),
        Arg("topk_ids", "T K", "int32", "each token's experts, -1 for one that is not here"),
        Arg("w_down", "E D I", "F", "down projections, [out, in]"),
        Arg("w_gate_up", "E 2*I D", "F", "gate and up projections, [out, in], gate's rows first"),
        Arg("shared", "T D", "F", "the shared expert's result", optional=True),
    ),
    scalars=(
        Scalar("limit", "clamp of the gated activation, above 0; None for no clamp"),
        WEIGHT_FORMAT,
    ),
    outs=(Out("out", "T D", "F", "the layer's result on this rank"),),
    dtypes={"F": FLOATS, "A": ("float32", "float64")},
    constraints=(LIMIT,),
    rounding="as its parts: each product and the activation rounded to the storage dtype, or kept in fp32; the "
    "weighted sum in fp32, rounded once",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"out": Calibrated(depth=("D", "I", "K"), amplify=lambda args: 4.0)},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        BadInput("expert_too_large", "VALUE", _with_id(7)),
        BadInput("expert_below_minus_one", "VALUE", _with_id(-2)),
        BadInput("limit_zero", "SCALAR", lambda args: {**args, "limit": 0.0}),
    ),
    source="spec 5.2, 6.3, 6.4",
)
