"""glm5_hal.prepare on a CPU: the plain weights, and beside them what a product over them is faster with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_hal import context, ops, prepare
from glm5_hal.backends.cpu.weights import PACKED
from glm5_hal.conformance.cases import Case, cases
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.subject import Subject, prepared
from glm5_hal.conformance.trial import Trial
from glm5_hal.ops._common.packed import LARGE, packed
from glm5_hal.signature import Facts

x86 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="a CPU without AVX2 has torch's products"
)

#: Those that see what another product could change. The others run a kernel again on the same weights.
LOOKED_AT = ("form", "accuracy", "integrity", "rerun", "poison", "nonfinite")


def weights_of(args: dict[str, Any]) -> dict[str, Tensor]:
    return {name: arg for name, arg in args.items() if name.startswith(("w_", "q_a_norm", "kv_a_norm", "k_norm"))}


def wide() -> list[Case]:
    """Cases at widths of real models, in the dtypes that are packed."""
    return [
        case
        for case in cases("standard", PACKED)
        if not case.bad and case.dtype in ("bfloat16", "float32") and case.sample.axes.get("E", 0) >= 6144
    ]


@x86
@pytest.mark.parametrize("case", wide(), ids=lambda case: case.id)
def test_what_was_prepared_passes_the_suite(case: Case) -> None:
    op, kinds = getattr(ops, case.op), set()

    def call(**args: Any) -> Any:
        made = prepare(case.op, weights_of(args), backend="cpu")
        kinds.update(name for name, weight in made.tensors.items() if packed(weight) is not None)
        return op(**{**args, **made.tensors, "weight_format": made.format})

    subject = prepared(case, 0)
    assert isinstance(subject, Subject)
    with context.use("cpu"), torch.inference_mode():
        kernel = op.choose(**subject.inputs.args).kernel
        trial = Trial(case, subject.inputs, kernel, call, "cpu", subject.expected, Facts(), subject.other)
        found = {name: CHECKS[name](trial) for name in LOOKED_AT}
    assert {name: finding.detail for name, finding in found.items() if finding.failed} == {}
    if case.dtype == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert "w_q_b" in kinds


@pytest.mark.parametrize("op", PACKED)
def test_the_plain_weights_stay_what_they_are(op: str) -> None:
    subject = prepared(next(iter(cases("smoke", (op,)))), 0)
    assert isinstance(subject, Subject)
    plain = weights_of(dict(subject.inputs.args))
    made = prepare(op, plain, backend="cpu")
    assert made.format == "plain"
    assert all(made[name] is weight for name, weight in plain.items())
    assert all(weight.numel() < LARGE and packed(weight) is None for weight in plain.values())


def test_experts_are_not_kept_twice() -> None:
    experts = {"w_gate_up": torch.zeros(4, 512, 512), "w_down": torch.zeros(4, 512, 256)}
    made = prepare("moe_experts", experts, backend="cpu")
    assert all(packed(weight) is None for weight in made.tensors.values())
