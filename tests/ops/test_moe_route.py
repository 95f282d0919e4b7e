"""moe_route against a router written with Python's own numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._moe_route import SPEC, moe_route
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
