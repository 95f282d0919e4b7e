"""moe_combine against sums of Python numbers."""

from __future__ import annotations

import math

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops._moe_combine import SPEC, moe_combine
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_is_the_weighted_sum_that_it_says(sample: Sample) -> None:
    args = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args
    truth = oracle.truth(SPEC, args).outs["out"]
    y, shared = args["y"].tolist(), args["shared"]
    for t, rows in enumerate(args["inverse_ids"].tolist()):
        for d in range(truth.shape[1]):
            terms = [args["topk_weights"][t, k].item() * y[row][d] for k, row in enumerate(rows) if row >= 0]
            terms += [] if shared is None else [shared[t, d].item()]
            assert truth[t, d].item() == pytest.approx(math.fsum(terms), rel=1e-12, abs=1e-12)


def test_the_shared_expert_is_not_scaled() -> None:
    out = moe_combine(torch.zeros(1, 2), torch.tensor([[2.5]]), torch.tensor([[0]]).int(), torch.tensor([[3.0, 4.0]]))
    assert out.tolist() == [[3.0, 4.0]]


def test_a_token_without_experts_here_gets_zero() -> None:
    out = moe_combine(torch.full((1, 2), 7.0), torch.tensor([[math.nan]]), torch.tensor([[-1]]).int())
    assert out.tolist() == [[0.0, 0.0]]


def test_it_is_rounded_once() -> None:
    # Each half step alone is lost beside 1 in bfloat16; together they make a whole one.
    y = torch.tensor([[1.0], [2.0**-8], [2.0**-8]]).bfloat16()
    out = moe_combine(y, torch.ones(1, 3), torch.tensor([[0, 1, 2]]).int())
    assert out.item() == 1.0078125


def test_what_no_id_names_is_not_read() -> None:
    for sample in SMOKE:
        made = SPEC.inputs(sample, "float32", Draw(0, sample.id))
        poisoned = {k: v.masked_fill(made.poison[k], math.nan) if k in made.poison else v for k, v in made.args.items()}
        assert torch.equal(moe_combine(**made.args), moe_combine(**poisoned)), sample.id


@pytest.mark.parametrize(("row", "ok"), [(-2, False), (-1, True), (2, True), (3, False)])
def test_rows_are_checked(row: int, ok: bool) -> None:
    args = {"y": torch.ones(3, 1), "topk_weights": torch.ones(1, 1), "inverse_ids": torch.tensor([[row]]).int()}
    assert SPEC.check_values is not None
    if ok:
        SPEC.check_values(args)
        return
    with pytest.raises(HalError, match="inverse_ids") as refused:
        SPEC.check_values(args)
    assert refused.value.code == "VALUE"
