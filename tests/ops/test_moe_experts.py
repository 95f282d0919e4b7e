"""moe_experts against a layer of experts, token by token, in float64."""

from __future__ import annotations

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.calibrated import calibrated
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._common.references import reference_of
from glm5_hal.ops._moe_experts import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
experts = reference_of("moe_experts")


@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_it_is_the_layer_that_it_says(sample: Sample) -> None:
    args = SPEC.inputs(sample, "bfloat16", Draw(0, sample.id)).args
    truth = oracle.truth(SPEC, args).outs["out"]
    x, up, down = (args[n].double() for n in ("x", "w_gate_up", "w_down"))
    inner = down.shape[-1]
    for t in range(x.shape[0]):
        expected = torch.zeros(x.shape[1], dtype=torch.float64)
        for weight, e in zip(args["topk_weights"][t].tolist(), args["topk_ids"][t].tolist(), strict=True):
            if e < 0:
                continue
            gate, other = up[e, :inner] @ x[t], up[e, inner:] @ x[t]
            if args["limit"] is not None:
                gate, other = gate.clamp(max=args["limit"]), other.clamp(-args["limit"], args["limit"])
            expected += weight * (down[e] @ (gate / (1 + torch.exp(-gate)) * other))
        if args["shared"] is not None:
            expected += args["shared"][t].double()
        size = 1e-11 * max(1.0, float(expected.abs().max()))  # terms cancel: they are as large as the largest result
        torch.testing.assert_close(truth[t], expected, rtol=1e-11, atol=size)


def test_the_gates_rows_come_first() -> None:
    """One number through one expert: gate 30 (silu leaves it), up 2, down 5, weight 0.5, shared 1."""
    x, up, down = torch.tensor([[1.0]]), torch.tensor([[[30.0], [2.0]]]), torch.tensor([[[5.0]]])
    out = experts(x, torch.tensor([[0.5]]), torch.tensor([[0]]).int(), up, down, torch.tensor([[1.0]]))
    assert out.item() == pytest.approx(30 * 2 * 5 * 0.5 + 1, rel=1e-6)


def test_nothing_of_an_expert_elsewhere_is_read() -> None:
    for sample in SMOKE:
        made = SPEC.inputs(sample, "float32", Draw(0, sample.id))
        poisoned = {
            k: v.masked_fill(made.poison[k], torch.nan) if k in made.poison else v for k, v in made.args.items()
        }
        assert torch.equal(experts(**made.args), experts(**poisoned)), sample.id


def test_ranks_that_share_the_experts_add_up_to_one_that_has_all() -> None:
    """Expert parallelism: each rank takes its half of the experts, ids of the others are -1."""
    args = dict(SPEC.inputs(SMOKE[0], "float64", Draw(0, "x")).args)
    args["topk_weights"] = args["topk_weights"].double()
    whole, parts = experts(**args), []
    for first, last in ((0, 3), (3, 7)):
        ids = args["topk_ids"]
        local = torch.where((ids >= first) & (ids < last), ids - first, -1)
        mine = {"topk_ids": local, "w_gate_up": args["w_gate_up"][first:last], "w_down": args["w_down"][first:last]}
        parts.append(experts(**{**args, **mine}))
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


def test_fewer_roundings_than_the_parts_make_are_as_good() -> None:
    """A fused kernel keeps the activation in float32: within the budget, and no copy of the composite."""
    sample = Sample("x", {"T": 40, "K": 3, "D": 128, "I": 96, "E": 5, "shared": True})
    args = SPEC.inputs(sample, "bfloat16", Draw(0, "x")).args
    truth, honest = oracle.truth(SPEC, args).outs["out"], oracle.emulation(SPEC, args).outs["out"]
    wide = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in args.items()}
    fused = experts(**wide).bfloat16()
    assert not torch.equal(fused, experts(**args))
    for out in (fused, experts(**args)):
        assert calibrated(out, truth, honest, unit=2.0**-8, floor=1e-5).ok
