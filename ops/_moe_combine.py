"""moe_combine: every token's weighted sum over its experts' results.

Legend: T tokens, K experts per token, M rows of results, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common import checks
from glm5_hal.ops._common.precision import down, up
from glm5_hal.spec import FLOATS, Arg, BadInput, Calibrated, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample


def moe_combine(y: Tensor, topk_weights: Tensor, inverse_ids: Tensor, shared: Tensor | None = None) -> Tensor:
    """out[t] = Σ_k topk_weights[t, k] · y[inverse_ids[t, k]] + shared[t].

    An inverse id of −1 contributes nothing, and its weight is not read; nor is a row of y that no id names. The shared
    expert's result is added as it is: neither router weight nor scaling factor applies to it. A token without any
    expert here gets its shared part, or zero.
    """
    out = up(y).new_zeros(inverse_ids.shape[0], y.shape[1])
    for weights, rows in zip(topk_weights.T, inverse_ids.T, strict=True):
        here = rows >= 0
        out[here] += up(weights[here])[:, None] * up(y[rows[here].long()])
    return down(out if shared is None else out + up(shared), y)


def check_values(args: Mapping[str, Any]) -> None:
    rows = args["y"].shape[0]
    checks.in_range("moe_combine", "inverse_ids", args["inverse_ids"], -1, rows, f"y has {rows} rows, -1 is none")


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    tiny = {"T": 11, "K": 4, "D": 72}
    yield Sample("tokens", tiny)
    yield Sample("with_shared", {**tiny, "shared": True})
    yield Sample("negative_weights", {**tiny, "negative": True}, tags=edge, dtypes=("bfloat16",))
    yield Sample("elsewhere", {**tiny, "elsewhere": 5, "spare": 6})
    yield Sample("elsewhere_with_shared", {**tiny, "elsewhere": 5, "spare": 3, "shared": True})
    yield Sample("nothing_here", {**tiny, "elsewhere": 8, "T": 1, "shared": True}, tags=edge)
    yield Sample("many_rows", {**tiny, "D": 96, "elsewhere": 2, "spare": 5000})  # more than fit a tile with all columns
    yield Sample("most_rows", {**tiny, "D": 2, "spare": 1 << 18}, tags=edge, dtypes=("bfloat16",))
    yield Sample("one", {"T": 1, "K": 1, "D": 1}, tags=edge)
    yield Sample("no_tokens", {**tiny, "T": 0, "spare": 3, "shared": True}, tags=edge)
    yield Sample("integers", {**tiny, "elsewhere": 2, "spare": 2, "shared": True}, fill="exact")
    yield Sample("many_slots", {"T": 260, "K": 9, "D": 3}, dtypes=("bfloat16",))  # many tokens too
    glm = {"K": 8, "D": 6144}
    standard: dict[str, Any] = {"level": "standard", "tags": glm5, "dtypes": ("bfloat16", "float32")}
    yield Sample("glm5", {**glm, "T": 128, "shared": True}, **standard)
    yield Sample("glm5-ep32", {**glm, "T": 256, "elsewhere": 7}, **standard)
    yield Sample("glm5-decode", {**glm, "T": 4, "shared": True}, **standard)


def router_weights(draw: Draw, tokens: int, top_k: int) -> Tensor:
    """Weights between 0 and 1, some far smaller than others, fp32."""
    return draw.normal(tokens, top_k, dtype="float32", scale=2.0**-3) + 0.5


def exact_weights(draw: Draw, tokens: int, top_k: int) -> Tensor:
    """Weights of more digits than the narrow dtypes hold; products with integers, and sums, are exact in fp32. None is
    zero: a product of zero would have a sign."""
    return (2049.0 + 2.0 * draw.integers(0, 1024, tokens, top_k)) / 4096


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes, exact = sample.axes, sample.fill == "exact"
    T, K, D = (axes[a] for a in "TKD")
    here = draw.integers(0, 8, T, K) >= axes.get("elsewhere", 0)
    if axes.get("elsewhere") and T > 1:
        here[0], here[-1] = False, True
    M = int(here.sum()) + axes.get("spare", 0)
    order = draw.permutation(M)[: int(here.sum())]
    inverse = torch.full((T, K), -1).masked_scatter(here, order).int()
    unread = torch.ones(M, 1, dtype=torch.bool).index_fill(0, order, False).expand(M, D)
    # As many digits as bfloat16 holds: a sum that is rounded to storage after every expert shows.
    y = draw.small(M, D, dtype=dtype, bound=127) if exact else draw.normal(M, D, dtype=dtype)
    weights = exact_weights(draw, T, K) if exact else router_weights(draw, T, K)
    if axes.get("negative"):
        weights[:, ::2] *= -1.0
    extra = None
    if axes.get("shared"):
        extra = draw.small(T, D, dtype=dtype) if exact else draw.normal(T, D, dtype=dtype)
    args = {
        "y": y.masked_fill(unread, 77.0),
        "topk_weights": weights.float().masked_fill(~here, 77.0),
        "inverse_ids": inverse,
        "shared": extra,
    }
    return Inputs(args, {"y": unread, "topk_weights": ~here})


def fuzz(pick: Pick) -> Sample:
    axes = {"T": pick.integer(0, 60), "K": pick.integer(1, 8), "D": pick.integer(1, 200)}
    here = {"elsewhere": pick.integer(0, 8), "spare": pick.integer(0, 9), "shared": pick.of((False, True))}
    return Sample("fuzz", {**axes, **here}, tags=frozenset({"empty"}))


def cost(axes: Mapping[str, Any]) -> Cost:
    T, K, D = axes["T"], axes["K"], axes["D"]
    rows = min(axes["M"], T * K)
    return Cost(flops=2 * rows * D, bytes=axes["itemsize"] * (rows * D + T * D) + 8 * T * K)


def _with_row(value: int) -> Any:
    def spoil(args: dict[str, Any]) -> dict[str, Any]:
        args["inverse_ids"] = args["inverse_ids"].clone()
        args["inverse_ids"][-1, -1] = value if value < 0 else args["y"].shape[0]
        return args

    return spoil


SPEC = OpSpec(
    name="moe_combine",
    group="moe",
    reference=moe_combine,
    args=(
        Arg("y", "M D", "F", "the experts' results"),
        Arg("topk_weights", "T K", "A", "router weights, scaling factor included"),
        Arg("inverse_ids", "T K", "int32", "the row of each (token, slot), -1 for none, as moe_permute gives them"),
        Arg("shared", "T D", "F", "the shared expert's result", optional=True),
    ),
    outs=(Out("out", "T D", "F", "the layer's result on this rank"),),
    dtypes={"F": FLOATS, "A": ("float32", "float64")},
    rounding="weighted rows are neither rounded before their sum nor summed in less than fp32; rounded once, after the "
    "shared part",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"out": Calibrated(depth=("K",))},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        BadInput("row_past_the_end", "VALUE", _with_row(0)),
        BadInput("row_below_minus_one", "VALUE", _with_row(-2)),
        BadInput("shared_size", "SHAPE", lambda args: {**args, "shared": args["y"][:, :-1]}),
    ),
    source="spec 5.2, 6.3, 10.17, 10.18",
)
