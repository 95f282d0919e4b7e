"""moe_experts against a layer of experts, token by token, in float64."""

from __future__ import annotations

import pytest
import torch

from glm5_hal.conformance import oracle
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops._moe_experts import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]


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
        torch.testing.assert_close(truth[t], expected, rtol=1e-11, atol=1e-11)
