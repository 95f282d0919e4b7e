"""moe_route: which experts a token goes to, and with what weights.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common.precision import down, exact, up
from glm5_hal.spec import (
    Arg,
    BadInput,
    Constraint,
    Cost,
    Draw,
    Given,
    Inputs,
    OpSpec,
    Out,
    Pick,
    Sample,
    Scalar,
    Selection,
)


def moe_route(
    router_logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    scoring_func: str = "sigmoid",
) -> tuple[Tensor, Tensor]:
    """The top_k experts of every token by s + bias, weighted by s: returns (weights, ids).

    s = sigmoid(logits) (or softmax over the experts), and c = s + bias is what experts are chosen by. With
    ``n_group`` > 1 the experts form that many equal groups in order; only the ``topk_group`` groups with the largest
    sum of their two best c stay eligible. Of the eligible experts the top_k with the largest c are chosen. c may be
    negative, so what is not eligible counts as −inf, never as 0.

    ``bias`` (e_score_correction_bias) takes part in the choice alone: weights are s of the chosen, divided by (their
    sum + 1e-20) if ``norm_topk_prob``, times ``routed_scaling_factor`` (2.5 for GLM-5). The factor is applied here and
    nowhere else.

    Ids come in order of c, highest first. Where ``canonical_ties`` is claimed, equals (groups too) are ordered by the
    lower index. A row with a NaN has no meaningful weights, but its ids are distinct experts all the same.
    """
    scores, choice = score(router_logits, bias, scoring_func)
    if n_group > 1:
        groups = group_scores(choice, n_group)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, _best(groups, topk_group), True)
        choice = among(choice, kept)
    ids = _best(choice, top_k)
    weights = weigh(scores.gather(1, ids), norm_topk_prob, routed_scaling_factor)
    return down(weights, router_logits), ids.int()


def score(router_logits: Tensor, bias: Tensor | None, scoring_func: str) -> tuple[Tensor, Tensor]:
    """s, and c = s + bias."""
    logits = up(router_logits)
    scores = torch.sigmoid(logits) if scoring_func == "sigmoid" else torch.softmax(logits, -1)
    return scores, scores if bias is None else scores + up(bias)


def group_scores(choice: Tensor, n_group: int) -> Tensor:
    """The sum of each group's two best, [T, n_group]."""
    T, E = choice.shape
    return choice.reshape(T, n_group, E // n_group).sort(-1, descending=True).values[..., :2].sum(-1)


def among(choice: Tensor, kept: Tensor) -> Tensor:
    """c, with −inf for the experts of groups that are not kept."""
    return choice.masked_fill(~kept.repeat_interleave(choice.shape[1] // kept.shape[1], 1), -torch.inf)


def weigh(chosen: Tensor, norm_topk_prob: bool, routed_scaling_factor: float) -> Tensor:
    """Weights from the scores of the chosen experts."""
    if norm_topk_prob:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * routed_scaling_factor


def _best(scores: Tensor, k: int) -> Tensor:
    """Places of the k largest, largest first, equals by the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


# --- judging a choice ------------------------------------------------------------------------------------------------


def score_rounding(args: Mapping[str, Any], scores: Tensor) -> Tensor:
    """By how much an honest c may be off, per row: a few units in the last place, and softmax's sum over E."""
    unit = torch.finfo(args["router_logits"].dtype).eps / 2
    size = scores if args["bias"] is None else scores + args["bias"].double().abs()
    return size.amax(-1).mul(2 * unit * (4 + scores.shape[1] ** 0.5))


def oracle_scores(args: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """float64 c of the eligible experts, and what it may be off by.

    Where two groups tie for the last place within that, either is right: then the experts of both are eligible, and the
    row asks for no more than that.
    """
    with exact():
        scores, choice = score(args["router_logits"], args["bias"], args["scoring_func"])
    tau = score_rounding(args, scores)
    if args["n_group"] == 1 or len(choice) == 0:
        return choice, tau
    groups = group_scores(choice, args["n_group"])
    order = _best(groups, args["n_group"])
    last = groups.gather(1, order[:, args["topk_group"] - 1 : args["topk_group"]])
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : args["topk_group"]], True)
    rivals = ~kept & (groups >= last - 4 * tau[:, None])  # each group's sum of two is off by up to 2 tau
    return among(choice, kept | rivals), tau.masked_fill(rivals.any(1), torch.inf)


def oracle_weights(args: Mapping[str, Any], outputs: tuple[Tensor, ...]) -> Tensor:
    """float64 weights of the experts that the kernel itself chose."""
    with exact():
        scores, _ = score(args["router_logits"], None, args["scoring_func"])
    ids = outputs[1].long().clamp(0, scores.shape[1] - 1)  # an invalid id is the selection's finding
    return weigh(scores.gather(1, ids), args["norm_topk_prob"], args["routed_scaling_factor"])


# --- samples ---------------------------------------------------------------------------------------------------------

GLM5 = {"E": 256, "top_k": 8, "routed_scaling_factor": 2.5}
DSV32 = {**GLM5, "n_group": 8, "topk_group": 4}
TINY = {"T": 9, "E": 48, "top_k": 6, "routed_scaling_factor": 2.5}
GROUPS = {**TINY, "n_group": 6, "topk_group": 2}
OPTIONS = ("top_k", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "scoring_func")


def samples() -> Iterator[Sample]:
    edge, ties, only = frozenset({"edge"}), frozenset({"edge", "ties"}), ("float32",)

    def smoke(name: str, axes: dict[str, Any], fill: str = "normal", tags: frozenset[str] = frozenset()) -> Sample:
        return Sample(name, axes, fill=fill, tags=tags, dtypes=only)

    yield smoke("biased", TINY)
    yield smoke("unbiased", {**TINY, "biased": False})
    yield smoke("negative_choice", {**TINY, "shift": -2.0}, tags=edge)
    yield smoke("unnormalised", {**TINY, "norm_topk_prob": False})
    yield smoke("vanishing", {**TINY, "biased": False, "offset": -46.0}, tags=edge)
    yield smoke("softmax", {**TINY, "scoring_func": "softmax"})
    yield smoke("softmax_unbiased", {**TINY, "scoring_func": "softmax", "biased": False, "norm_topk_prob": False})
    yield smoke("groups", GROUPS)
    yield smoke("two_groups", {**GROUPS, "n_group": 2, "topk_group": 1})
    yield smoke("groups_negative_choice", {**GROUPS, "shift": -2.0}, tags=edge)
    yield smoke("groups_exhausted", {**GROUPS, "top_k": 16}, tags=edge)
    yield smoke("groups_all_kept", {**GROUPS, "topk_group": 6}, tags=edge)
    yield smoke("groups_softmax", {**GROUPS, "scoring_func": "softmax"})
    yield Sample("ties", {**TINY, "values": 4}, fill="exact", tags=ties, dtypes=("float32", "float64"))
    yield smoke("ties_in_groups", {**GROUPS, "values": 4}, "exact", ties)
    yield smoke("tied_groups", {**GROUPS, "values": 2, "spread": False}, tags=ties)
    yield smoke("all_equal", {**TINY, "values": 1, "norm_topk_prob": False}, "exact", ties)
    yield smoke("every_expert", {**TINY, "top_k": 48}, tags=edge)
    yield smoke("one_of_one", {"T": 5, "E": 1, "top_k": 1, "norm_topk_prob": False}, tags=edge)
    yield smoke("no_tokens", {**GROUPS, "T": 0}, tags=edge)
    yield smoke("many_experts", {**TINY, "E": 288})
    yield smoke("twelve_groups", {**TINY, "n_group": 12, "topk_group": 6})
    yield smoke("large_softmax", {**TINY, "scoring_func": "softmax", "biased": False, "offset": 95.0}, tags=edge)
    yield smoke("far_rows", {**TINY, "biased": False, "far": True}, tags=edge)
    yield Sample("many_tokens", {**TINY, "T": 1100}, "standard", dtypes=only)
    for tokens in (64, 1024):
        glm5 = frozenset({"glm5"})
        yield Sample(f"glm5-{tokens}", {**GLM5, "T": tokens}, "standard", tags=glm5, dtypes=only)
    yield Sample("glm5-ties-256", {**GLM5, "T": 256, "values": 24}, "standard", "exact", ties, only)
    for tokens in (64, 256):
        yield Sample(f"dsv32-{tokens}", {**DSV32, "T": tokens}, "standard", dtypes=only)


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    T, E, values = axes["T"], axes["E"], axes.get("values")
    logits, bias = draw.normal(T, E, dtype=dtype, scale=2.0), None
    if values:
        # Few values, far apart, and a few rows of a size of their own: equal scores in every row.
        logits = (draw.integers(0, values, T, E) + draw.integers(0, 8, T, 1)).to(logits.dtype) / 4
        if "n_group" in axes and axes.get("spread", True):
            logits = _distinct_groups(draw, logits, axes["n_group"], values)
    elif axes.get("biased", True):
        bias = draw.normal(E, dtype=dtype, scale=2.0**-3) + axes.get("shift", 0.0)
    if axes.get("far"):  # where e^x overflows, and where scores all but vanish
        logits[0] += 95.0
        logits[1] -= 70.0
    options = {name: axes[name] for name in OPTIONS if name in axes}
    defaults = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
    scored = {"scoring_func": "sigmoid"}
    return Inputs({"router_logits": logits + axes.get("offset", 0.0), "bias": bias, **defaults, **scored, **options})


def _distinct_groups(draw: Draw, logits: Tensor, n_group: int, values: int) -> Tensor:
    """No two groups tie: each has an offset of its own, and two of its best."""
    T, E = logits.shape
    order: Tensor = draw.integers(0, 1 << 30, T, n_group).argsort(dim=-1, stable=True)
    best = draw.integers(0, 1 << 30, T, n_group, E // n_group).argsort(dim=-1, stable=True) < 2
    step: Tensor = draw.integers(0, values, T, n_group, E // n_group).masked_fill(best, values - 1)
    return ((step + order[..., None]).to(logits.dtype) / 4).flatten(1)


def fuzz(pick: Pick) -> Sample:
    groups, size = pick.integer(1, 6), pick.integer(2, 40)
    kept = pick.integer(1, groups)
    axes = {"T": pick.integer(0, 30), "E": groups * size, "n_group": groups, "topk_group": kept}
    how = {"norm_topk_prob": pick.of((True, False)), "scoring_func": pick.of(("sigmoid", "softmax"))}
    more = {
        "top_k": pick.integer(1, min(16, kept * size)),
        "routed_scaling_factor": 2.5,
        "biased": pick.of((True, False)),
    }
    return Sample("fuzz", {**axes, **how, **more}, dtypes=("float32",))


def cost(axes: Mapping[str, Any]) -> Cost:
    T, E, K = axes["T"], axes["E"], axes["top_k"]
    return Cost(flops=6 * T * E, bytes=axes["itemsize"] * (T * E + E + T * K) + 4 * T * K)


SPEC = OpSpec(
    name="moe_route",
    group="moe",
    reference=moe_route,
    args=(
        Arg("router_logits", "T E", "A", "logits of the router's fp32 product"),
        Arg("bias", "E", "A", "e_score_correction_bias; None for none", optional=True),
    ),
    scalars=(
        Scalar("top_k", "experts per token: 8 for GLM-5", low=1),
        Scalar("n_group", "groups that the experts form: 1 for GLM-5, 8 for DeepSeek-V3.2", low=1),
        Scalar("topk_group", "groups that stay eligible: 1 for GLM-5, 4 for DeepSeek-V3.2", low=1),
        Scalar("norm_topk_prob", "whether the weights are divided by their sum"),
        Scalar("routed_scaling_factor", "factor on the weights: 2.5 for GLM-5"),
        Scalar("scoring_func", "how logits become scores", choices=("sigmoid", "softmax")),
    ),
    outs=(
        Out("topk_weights", "T top_k", "A", "weights of the chosen experts"),
        Out("topk_ids", "T top_k", "int32", "the chosen experts, best first"),
    ),
    dtypes={"A": ("float32", "float64")},
    constraints=(
        Constraint(
            "n_group divides E into groups of two experts at least, or is 1",
            lambda k: k["n_group"] == 1 or (k["E"] % k["n_group"] == 0 and k["E"] >= 2 * k["n_group"]),
            "pass the model's n_group, 1 where experts are not grouped",
        ),
        Constraint(
            "topk_group is at most n_group",
            lambda k: bool(k["topk_group"] <= k["n_group"]),
            "pass the model's topk_group, 1 where experts are not grouped",
        ),
        Constraint(
            "top_k is at most the number of experts in topk_group groups",
            lambda k: bool(k["top_k"] <= k["E"] // k["n_group"] * k["topk_group"]),
            "choose fewer experts, or among more groups",
        ),
    ),
    rounding="none: scores, bias, sums and weights in fp32 (float64 where the logits are)",
    attributes=("deterministic", "batch_invariant", "canonical_ties", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"topk_ids": Selection(oracle_scores, padded=False), "topk_weights": Given(oracle_weights, depth=("E",))},
    cost=cost,
    fuzz=fuzz,
    errors=(
        BadInput("top_k_zero", "SCALAR", lambda args: {**args, "top_k": 0}),
        BadInput("unknown_scoring_func", "SCALAR", lambda args: {**args, "scoring_func": "relu"}),
        BadInput("top_k_above_experts", "SHAPE", lambda args: {**args, "top_k": args["router_logits"].shape[1] + 1}),
        BadInput("uneven_groups", "SHAPE", lambda args: {**args, "n_group": 7}),
        BadInput("groups_of_one", "SHAPE", lambda args: {**args, "n_group": 48, "topk_group": 48}),
        BadInput("more_groups_kept_than_there_are", "SHAPE", lambda args: {**args, "n_group": 2, "topk_group": 3}),
        BadInput("top_k_above_kept_experts", "SHAPE", lambda args: {**args, "n_group": 12, "topk_group": 1}),
    ),
    source="spec 5.1, 10.17, 10.21; DeepSeek-V3, arXiv:2412.19437",
)
