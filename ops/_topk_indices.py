"""topk_indices: the k best keys of every row, as a total order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common import checks
from glm5_hal.spec import Arg, BadInput, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample, Scalar, Selection

#: Scores and lengths of one row read as they are: no rounding stands between a score and its place.
EXACT_SCORES = 0.0


def topk_indices(scores: Tensor, seq_lens: Tensor, *, top_k: int) -> Tensor:
    """The ``top_k`` highest of the first ``seq_lens[t]`` scores of each row, as ascending indices, -1 at the tail.

    A total order: score descending, then index ascending; −0.0 equals +0.0. Kernels that claim ``canonical_ties`` and
    ``sorted_indices`` give exactly this; others may choose otherwise among equal scores, and list in any order. NaN and
    −inf are never chosen, so a row with fewer than ``top_k`` eligible scores ends in -1. What lies at or beyond
    ``seq_lens[t]`` is not read.
    """
    T, S = scores.shape
    positions = torch.arange(S, device=scores.device)
    values = scores.double() + 0.0  # -0.0 + 0.0 is +0.0
    eligible = (positions < seq_lens[:, None]) & ~values.isnan() & (values != -torch.inf)
    order = torch.where(eligible, values, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = torch.where(eligible.gather(-1, order), order, S).sort(dim=-1).values
    out = torch.full((T, top_k), -1, dtype=torch.int32, device=scores.device)
    out[:, : chosen.shape[1]] = torch.where(chosen < S, chosen, -1).int()
    return out


def oracle_scores(args: Mapping[str, Any]) -> tuple[Tensor, float]:
    scores = args["scores"].double().clone()
    beyond = torch.arange(scores.shape[1]) >= args["seq_lens"][:, None]
    return scores.masked_fill(beyond, -torch.inf), EXACT_SCORES


def check_values(args: Mapping[str, Any]) -> None:
    width = args["scores"].shape[1]
    checks.in_range("topk_indices", "seq_lens", args["seq_lens"], 0, width + 1, f"rows have {width} scores")


def samples() -> Iterator[Sample]:
    small = {"T": 6, "S": 150, "K": 64}
    yield Sample("rows", small)
    yield Sample("ties", {**small, "values": 5}, tags=frozenset({"edge", "ties"}))
    yield Sample("all_equal", {**small, "values": 1}, tags=frozenset({"edge", "ties"}))
    yield Sample("both_zeros", {**small, "zeros": True}, tags=frozenset({"edge", "ties"}))
    yield Sample("negative", {**small, "shift": -64.0}, tags=frozenset({"edge"}))
    yield Sample("non_finite", {**small, "non_finite": True}, tags=frozenset({"edge"}))
    yield Sample("long_rows", {"T": 3, "S": 6500, "K": 512})
    yield Sample("periodic", {"T": 3, "S": 8192, "K": 600, "period": 16}, tags=frozenset({"edge"}))
    yield Sample("lowest", {**small, "values": 40, "lowest": True}, tags=frozenset({"edge"}))
    yield Sample("fewer_than_k", {"T": 5, "S": 40, "K": 64}, tags=frozenset({"edge"}))
    yield Sample("exactly_k", {"T": 3, "S": 64, "K": 64}, tags=frozenset({"edge"}))
    yield Sample("no_rows", {"T": 0, "S": 64, "K": 8}, tags=frozenset({"edge"}))
    yield Sample("no_keys", {"T": 2, "S": 0, "K": 8}, tags=frozenset({"edge"}))
    yield Sample("one", {"T": 1, "S": 1, "K": 1}, tags=frozenset({"edge"}))
    yield Sample("many_rows", {"T": 40, "S": 50, "K": 9}, dtypes=("bfloat16",))
    yield Sample("clustered", {"T": 2, "S": 6000, "K": 2304, "cluster": 2200}, dtypes=("float32",))
    yield Sample("special", {"T": 9, "S": 41, "K": 8, "special": True}, tags=frozenset({"edge", "ties"}))
    yield Sample(
        "special-best", {"T": 9, "S": 41, "K": 1, "special": True}, tags=frozenset({"edge", "ties"}),
        dtypes=("float32",),
    )  # fmt: skip
    yield Sample("wide_rows", {"T": 2, "S": 140_000, "K": 600}, "standard", dtypes=("float32",))
    for keys in (2047, 2049, 16384):
        yield Sample(f"glm5-{keys}", {"T": 16, "S": keys, "K": 2048}, "standard", tags=frozenset({"glm5"}))
    yield Sample("glm5-ties-4097", {"T": 16, "S": 4097, "K": 2048, "values": 40}, "standard", tags=frozenset({"glm5"}))
    yield Sample("glm5-65536", {"T": 4, "S": 65536, "K": 2048}, "standard", tags=frozenset({"glm5"}))
    yield Sample("glm5-131072", {"T": 4, "S": 131072, "K": 2048}, "full", tags=frozenset({"glm5"}))


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    T, S, K = (sample.axes[a] for a in "TSK")
    if sample.axes.get("special"):
        scores = _special(draw, S, dtype)
        return Inputs({"scores": scores, "seq_lens": torch.tensor([S] * (T - 1) + [0]).int(), "top_k": K})
    if "values" in sample.axes:  # few distinct values: ties across the k-th place in every row
        scores = draw.integers(0, sample.axes["values"], T, S).to(getattr(torch, dtype)) - 2
    elif sample.axes.get("zeros"):  # the k-th place is among zeros of both signs
        kinds = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, -0.0, -0.0, -0.0], dtype=getattr(torch, dtype))
        scores = kinds[draw.integers(0, 8, T, S)]
    else:
        scores = draw.normal(T, S, dtype=dtype) + sample.axes.get("shift", 0.0)
    if "period" in sample.axes:  # the best scores stand a period apart: what a stride of it sees is not typical
        scores[:, :: sample.axes["period"]] += 8.0
    if "cluster" in sample.axes:  # the best scores stand side by side
        scores[:, : sample.axes["cluster"]] += 8.0
    if sample.axes.get("lowest"):  # half of the scores are the lowest number: eligible, and no mark of a mask
        scores[draw.integers(0, 2, T, S) == 0] = torch.finfo(scores.dtype).min
        scores[:, K // 2 :] = scores[:, K // 2 :].clamp_max(torch.finfo(scores.dtype).min)
    if sample.axes.get("non_finite"):
        kinds = draw.integers(0, 8, T, S)
        for code, value in enumerate((torch.nan, -torch.inf, torch.inf, -0.0)):
            scores[kinds == code] = value
        scores[:1] = -torch.inf
    lengths = draw.integers(0, S + 1, T).int()
    if T > 1:
        lengths[0], lengths[-1] = S, min(S, K - 1)
    beyond = torch.arange(S) >= lengths[:, None]
    scores[beyond] = 96.0  # garbage that would win
    return Inputs({"scores": scores, "seq_lens": lengths, "top_k": K}, {"scores": beyond})


def _special(draw: Draw, width: int, dtype: str) -> Tensor:
    """A row each of numbers that kernels which sort keys made of a score's bits, or reduce pairs, may mishandle."""
    kind = getattr(torch, dtype)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.itemsize]
    sign, one = torch.iinfo(whole).min, torch.ones((), dtype=kind).view(whole).item()
    normal, order = draw.normal(width, dtype=dtype), draw.permutation(width).to(whole)
    negative_nan, infinite, largest = normal.clone(), normal.clone(), normal.clone()
    quiet = torch.full((), torch.inf, dtype=kind).view(whole) | torch.full((), torch.nan, dtype=kind).view(whole)
    negative_nan[3:] = (quiet | sign).view(kind)
    infinite[10:30] = torch.inf
    largest[5:10], largest[10:15] = torch.finfo(kind).max, torch.inf
    rows = [torch.arange(width).to(kind), normal, negative_nan, infinite, largest]
    # Subnormals, and neighbours in the last bits: above one, and below minus one.
    rows += [order.view(kind), (order + one).view(kind), (order + one | sign).view(kind), normal]
    return torch.stack(rows)


def fuzz(pick: Pick) -> Sample:
    axes = {"T": pick.integer(0, 12), "S": pick.integer(0, 700), "K": pick.integer(1, 300)}
    kinds: tuple[dict[str, Any], ...] = ({}, {"values": 5}, {"non_finite": True}, {"zeros": True})
    return Sample("fuzz", {**axes, **pick.of(kinds)})


def cost(axes: Mapping[str, Any]) -> Cost:
    return Cost(
        flops=axes["T"] * axes["S"], bytes=axes["itemsize"] * axes["T"] * axes["S"] + 4 * axes["T"] * axes["top_k"]
    )


def _too_long(args: dict[str, Any]) -> dict[str, Any]:
    args["seq_lens"] = args["seq_lens"].clone().fill_(args["scores"].shape[1] + 1)
    return args


def _negative(args: dict[str, Any]) -> dict[str, Any]:
    args["seq_lens"] = args["seq_lens"].clone().fill_(-1)
    return args


SPEC = OpSpec(
    name="topk_indices",
    group="dsa",
    reference=topk_indices,
    args=(
        Arg("scores", "T S", "F", "scores of every key"),
        Arg("seq_lens", "T", "int32", "how many leading scores of each row count"),
    ),
    scalars=(Scalar("top_k", "how many to choose, at least 1", low=1),),
    outs=(Out("indices", "T top_k", "int32", "chosen positions, -1 where fewer are eligible"),),
    dtypes={"F": ("float32", "bfloat16", "float16", "float64")},
    rounding="none: scores are compared as they are",
    attributes=("deterministic", "batch_invariant", "canonical_ties", "sorted_indices", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"indices": Selection(oracle_scores)},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        BadInput("seq_lens_too_long", "VALUE", _too_long),
        BadInput("seq_lens_negative", "VALUE", _negative),
        BadInput("top_k_zero", "SCALAR", lambda args: {**args, "top_k": 0}),
    ),
    source="spec 4.3, 4.4, 14.2",
)
