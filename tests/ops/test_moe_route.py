"""moe_route against a router written with Python's own numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.selecting import selection
from glm5_hal.ops._moe_route import SPEC, moe_route, oracle_scores, oracle_weights
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


def by_hand(args: dict[str, Any]) -> tuple[list[list[float]], list[list[int]]]:
    weights, ids = [], []
    for logits in args["router_logits"].double().tolist():
        if args["scoring_func"] == "sigmoid":
            s = [1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in logits]
        else:
            top = max(logits)
            total = math.fsum(math.exp(v - top) for v in logits)
            s = [math.exp(v - top) / total for v in logits]
        bias = [0.0] * len(s) if args["bias"] is None else args["bias"].double().tolist()
        c = [a + b for a, b in zip(s, bias, strict=True)]
        size = len(c) // args["n_group"]
        groups = [sum(sorted(c[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(args["n_group"])]
        kept = sorted(range(args["n_group"]), key=lambda g: (-groups[g], g))[: args["topk_group"]]
        open_ = [e for e in range(len(c)) if args["n_group"] == 1 or e // size in kept]
        chosen = sorted(open_, key=lambda e: (-c[e], e))[: args["top_k"]]
        total = sum(s[e] for e in chosen) + 1e-20 if args["norm_topk_prob"] else 1.0
        ids.append(chosen)
        weights.append([s[e] / total * args["routed_scaling_factor"] for e in chosen])
    return weights, ids


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_chooses_and_weighs_as_it_says(sample: Sample) -> None:
    args = dict(SPEC.inputs(sample, "float32", Draw(0, sample.id)).args)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    weights, ids = moe_route(**wide)
    expected_weights, expected_ids = by_hand(args)
    assert ids.tolist() == expected_ids
    torch.testing.assert_close(
        weights, torch.tensor(expected_weights, dtype=torch.float64).view_as(weights), rtol=1e-12, atol=1e-300
    )


def route(logits: list[float], bias: list[float] | None = None, **more: Any) -> tuple[list[float], list[int]]:
    b = None if bias is None else torch.tensor(bias)
    weights, ids = moe_route(torch.tensor([logits]), b, **{"top_k": 2, **more})
    return weights[0].tolist(), ids[0].tolist()


def test_the_bias_chooses_and_does_not_weigh() -> None:
    weights, ids = route([0.0, 0.0, 5.0], [3.0, 2.0, 0.0])
    assert ids == [0, 1]
    assert weights == [0.5, 0.5]


def test_weights_are_normalised_and_then_scaled_once() -> None:
    weights, _ = route([1.0, 2.0, -9.0], routed_scaling_factor=2.5)
    assert sum(weights) == pytest.approx(2.5)
    plain, _ = route([1.0, 2.0, -9.0], norm_topk_prob=False, routed_scaling_factor=2.5)
    assert plain == pytest.approx([2.5 / (1 + math.exp(-2)), 2.5 / (1 + math.exp(-1))])


def test_equal_scores_go_to_the_lower_expert() -> None:
    assert route([1.0, 1.0, 1.0, 1.0])[1] == [0, 1]


def test_a_group_that_is_out_stays_out_even_where_all_choice_scores_are_negative() -> None:
    # Filled with 0.0 instead of -inf, the closed group 0 would beat the open one, whose scores are negative.
    bias = [-3.0, -3.0, -2.0, -2.0]
    assert route([0.0] * 4, bias, n_group=2, topk_group=1)[1] == [2, 3]


def test_a_group_counts_with_its_two_best() -> None:
    logits = [4.0, -9.0, -9.0, 1.0, 1.0, -9.0]  # the best single expert is in group 0, the best pair in group 1
    assert route(logits, n_group=2, topk_group=1)[1] == [3, 4]


def test_one_group_is_no_limit() -> None:
    assert route([0.0, 3.0, 1.0, 2.0], n_group=1, topk_group=1)[1] == [1, 3]


def test_experts_come_in_order_of_their_choice_score() -> None:
    assert route([0.0, 3.0, 1.0, 2.0], top_k=4)[1] == [1, 3, 2, 0]


def test_a_sum_that_vanishes_is_held_up_by_1e_20() -> None:
    logits = [-46.0, -47.0]
    scores = [math.exp(v) for v in logits]
    assert route(logits)[0] == pytest.approx([s / (sum(scores) + 1e-20) for s in scores], rel=1e-5)
    assert sum(route(logits)[0]) < 0.6


def test_softmax_is_over_all_experts_and_not_over_the_chosen() -> None:
    weights, ids = route([2.0, 1.0, 0.0], scoring_func="softmax", norm_topk_prob=False)
    total = sum(math.exp(v) for v in (2.0, 1.0, 0.0))
    assert ids == [0, 1]
    assert weights == pytest.approx([math.exp(2) / total, math.exp(1) / total])


@pytest.mark.parametrize("n_group", [1, 2])
def test_a_row_of_nan_names_distinct_experts(n_group: int) -> None:
    _, ids = route([math.nan] * 4, n_group=n_group)
    assert len(set(ids)) == 2
    assert set(ids) <= set(range(4))


# --- how a choice is judged ------------------------------------------------------------------------------------------

GROUPED = {"top_k": 2, "n_group": 2, "topk_group": 1, "scoring_func": "sigmoid", "norm_topk_prob": True}


def judged(logits: list[float], ids: list[int], bias: list[float] | None = None, **more: Any) -> bool:
    args = {"router_logits": torch.tensor([logits]), "bias": None if bias is None else torch.tensor([*bias])}
    scores, tau = oracle_scores({**args, **GROUPED, **more})
    chosen = torch.tensor([ids], dtype=torch.int32)
    return selection(chosen, scores, tau, canonical=False, sorted_=False, padded=False).ok


def test_the_best_of_the_best_group_is_the_only_right_answer() -> None:
    logits = [1.0, 1.5, 0.0, 2.0]  # pairs: 0 and 1 together beat 2 and 3
    assert judged(logits, [1, 0])
    assert not judged(logits, [3, 1])  # the two best of all, groups ignored
    assert not judged(logits, [3, 2])
    assert not judged(logits, [1, 1])


@pytest.mark.parametrize("gap", [0.0, 1e-7])
def test_groups_that_tie_within_rounding_are_both_right(gap: float) -> None:
    logits = [1.0, 2.0, 1.0, 2.0 + gap]
    assert judged(logits, [1, 0])
    assert judged(logits, [3, 2])


def test_groups_further_apart_than_rounding_are_not() -> None:
    assert not judged([1.0, 2.0, 1.0, 2.001], [1, 0])


def test_vanishing_scores_are_held_to_their_own_size() -> None:
    """Scores near 1e-20: a bound relative to 1 would let any expert pass."""
    assert not judged([-46.0, -47.0, -48.0, -49.0], [0, 2], n_group=1)


def test_weights_are_judged_for_the_kernels_own_experts() -> None:
    args = {"router_logits": torch.tensor([[1.0, 2.0]]), "bias": None, **GROUPED, "routed_scaling_factor": 3.0}
    s = [1 / (1 + math.exp(-v)) for v in (1.0, 2.0)]
    for ids in ([0, 1], [1, 0]):
        expected = oracle_weights(args, (torch.empty(0), torch.tensor([ids], dtype=torch.int32)))
        assert expected[0].tolist() == pytest.approx([3 * s[i] / sum(s) for i in ids], rel=1e-12)


@pytest.mark.parametrize("sample", [s for s in SPEC.samples() if s.fill == "exact"], ids=lambda s: s.id)
def test_where_the_order_is_demanded_no_two_groups_tie(sample: Sample) -> None:
    """Else a kernel that breaks ties of groups in its own way would be failed for it."""
    args = SPEC.inputs(sample, "float32", Draw(0, sample.id)).args
    assert oracle_scores(args)[1].isfinite().all()


def test_the_sample_of_tied_groups_has_some() -> None:
    sample = next(s for s in SMOKE if s.id == "tied_groups")
    tau = oracle_scores(SPEC.inputs(sample, "float32", Draw(0, sample.id)).args)[1]
    assert tau.isinf().any()


def test_few_ties_are_left_in_ordinary_samples() -> None:
    """A row that may go either way tests nothing."""
    for sample in SPEC.samples():
        if "ties" not in sample.tags and sample.axes["T"] > 0:
            tau = oracle_scores(SPEC.inputs(sample, "float32", Draw(0, sample.id)).args)[1]
            assert tau.isinf().double().mean() <= 0.01, sample.id
