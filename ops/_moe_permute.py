"""moe_permute: tokens sorted by expert, so that each expert's rows lie together.

Legend: T tokens, K experts per token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common import checks
from glm5_hal.ops._common.precision import down, up
from glm5_hal.spec import FLOATS, Arg, BadInput, BitExact, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample, Scalar


def moe_permute(x: Tensor, topk_ids: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """One copy of x[t] for every (t, k) with a valid expert: returns (permuted, expert_offsets, inverse_ids).

    Rows are ordered by expert, within an expert by token, then by slot k. Expert e has the rows expert_offsets[e] to
    expert_offsets[e + 1] of ``permuted``, and (t, k) has the row inverse_ids[t, k].

    Id −1 means that the expert is not on this rank: no row, and inverse_ids −1. A token without any valid id is not
    read. ``permuted`` always has T·K rows, so that its shape does not depend on values; those from expert_offsets[−1]
    on are zero. Ids are local: 0 to num_experts − 1.
    """
    (T, K), values = topk_ids.shape, down(up(x), x)
    ids = topk_ids.reshape(-1).long()
    order = ids.masked_fill(ids < 0, num_experts).sort(stable=True).indices[: int((ids >= 0).sum())]
    permuted = values.new_zeros(T * K, x.shape[1])
    permuted[: len(order)] = values[order // K]
    inverse = torch.full_like(ids, -1)
    inverse[order] = torch.arange(len(order), device=x.device)
    counts = torch.bincount(ids[ids >= 0], minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return permuted, offsets.int(), inverse.view(T, K).int()


def check_values(args: Mapping[str, Any]) -> None:
    n = args["num_experts"]
    checks.in_range("moe_permute", "topk_ids", args["topk_ids"], -1, n, f"there are {n} experts, -1 is none of them")


def chosen_experts(
    draw: Draw, tokens: int, top_k: int, experts: int, elsewhere: int = 0, *, repeat: bool = False
) -> Tensor:
    """Distinct experts for every token, int32; of ``elsewhere`` in 8 ids the expert is on another rank (-1).

    Then the first token has no expert here, the last one all of them. With ``repeat`` some tokens name one twice.
    """
    order: Tensor = draw.integers(0, 1 << 40, tokens, experts).argsort(dim=-1, stable=True)
    away = draw.integers(0, 8, tokens, top_k) < elsewhere
    if elsewhere and tokens > 1:
        away[0], away[-1] = True, False
    if not experts:
        return torch.full((tokens, top_k), -1, dtype=torch.int32)
    ids = order[:, :top_k].int().masked_fill(away, -1)
    if repeat:
        ids[2::3, 1] = ids[2::3, 0]
    return ids


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    tiny = {"T": 13, "K": 3, "D": 40, "E": 7}
    yield Sample("tokens", tiny)
    yield Sample("elsewhere", {**tiny, "elsewhere": 5})
    yield Sample("nothing_here", {**tiny, "elsewhere": 8, "T": 1}, tags=edge | {"empty"})
    yield Sample("idle_experts", {**tiny, "T": 2, "E": 60}, tags=edge)
    yield Sample("one_expert", {**tiny, "K": 1, "E": 1}, tags=edge)
    yield Sample("no_experts", {**tiny, "E": 0, "elsewhere": 8}, tags=edge | {"empty"})
    yield Sample("no_tokens", {**tiny, "T": 0}, tags=edge)
    yield Sample("repeated_expert", {**tiny, "repeat": True}, tags=edge, dtypes=("bfloat16",))
    yield Sample("bits", {**tiny, "bits": True}, tags=edge)
    yield Sample("many_rows", {"T": 60, "K": 9, "D": 2, "E": 288}, dtypes=("bfloat16",))
    standard: dict[str, Any] = {"level": "standard", "tags": glm5, "dtypes": ("bfloat16",)}
    yield Sample("glm5", {"T": 128, "K": 8, "D": 6144, "E": 256}, **standard)
    yield Sample("glm5-ep32", {"T": 256, "K": 8, "D": 6144, "E": 8, "elsewhere": 6}, **standard)
    yield Sample("glm5-decode", {"T": 4, "K": 8, "D": 6144, "E": 256}, "standard", tags=glm5)


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    T, K, D, E = (sample.axes[a] for a in "TKDE")
    ids = chosen_experts(draw, T, K, E, sample.axes.get("elsewhere", 0), repeat=sample.axes.get("repeat", False))
    x = draw.normal(T, D, dtype=dtype)
    if sample.axes.get("bits"):  # numbers that arithmetic does not always give back
        x[:, 1::4], x[:, 2::4] = -0.0, torch.finfo(x.dtype).smallest_normal / 4
    unread = (ids < 0).all(1, keepdim=True).expand(T, D)
    return Inputs({"x": x.masked_fill(unread, 77.0), "topk_ids": ids, "num_experts": E}, {"x": unread})


def fuzz(pick: Pick) -> Sample:
    experts = pick.integer(1, 40)
    axes = {"T": pick.integer(0, 60), "K": pick.integer(1, min(8, experts)), "D": pick.integer(1, 200), "E": experts}
    return Sample("fuzz", {**axes, "elsewhere": pick.integer(0, 8)}, tags=frozenset({"empty"}))


def cost(axes: Mapping[str, Any]) -> Cost:
    T, K, D = axes["T"], axes["K"], axes["D"]
    return Cost(flops=0, bytes=axes["itemsize"] * (T * D + T * K * D) + 4 * (2 * T * K + axes["num_experts"] + 1))


def _with_id(value: int) -> Any:
    def spoil(args: dict[str, Any]) -> dict[str, Any]:
        args["topk_ids"] = args["topk_ids"].clone()
        args["topk_ids"][-1, -1] = value
        return args

    return spoil


SPEC = OpSpec(
    name="moe_permute",
    group="moe",
    reference=moe_permute,
    args=(
        Arg("x", "T D", "F", "tokens"),
        Arg("topk_ids", "T K", "int32", "each token's experts, -1 for one that is not here"),
    ),
    scalars=(Scalar("num_experts", "how many experts there are here", low=0),),
    outs=(
        Out("permuted", "T*K D", "F", "copies of the tokens, expert by expert; zero beyond the last"),
        Out("expert_offsets", "num_experts+1", "int32", "first row of each expert, and the number of rows"),
        Out("inverse_ids", "T K", "int32", "the row of each (token, slot), -1 where it has none"),
    ),
    dtypes={"F": FLOATS},
    rounding="none: values are copied",
    attributes=("deterministic", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"permuted": BitExact(), "expert_offsets": BitExact(), "inverse_ids": BitExact()},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        BadInput("expert_too_large", "VALUE", _with_id(7)),
        BadInput("expert_below_minus_one", "VALUE", _with_id(-2)),
        BadInput("experts_negative", "SCALAR", lambda args: {**args, "num_experts": -1}),
    ),
    source="spec 5.2, 6.3",
)
