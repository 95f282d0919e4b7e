"""The elementary kernels in plain torch: within the suite's budgets, and the same bits wherever a row stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from judging import NeverWaits, arguments, passes, points, smoke
from torch import Tensor

from glm5_hal.backend import Kernel
from glm5_hal.backends._torch.elementary import hadamard, rope, silu_and_mul
from glm5_hal.backends._torch.norms import add_rms_norm, rms_norm
from glm5_hal.capability import Accepted, Rejected
from glm5_hal.ops import specs
from glm5_hal.signature import Facts, Signature
from glm5_hal.spec import Sample

KERNELS = (rms_norm, add_rms_norm, rope, silu_and_mul, hadamard)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "rms_norm": lambda x: rms_norm.fn(x, torch.linspace(0.1, 1, x.shape[1]).to(x.dtype), eps=1e-5),
    "add_rms_norm": lambda x: add_rms_norm.fn(x, x * 3, torch.linspace(0.1, 1, x.shape[1]).to(x.dtype), eps=1e-5)[0],
    "silu_and_mul": lambda x: silu_and_mul.fn(x),
    "silu_and_mul-clamped": lambda x: silu_and_mul.fn(x, limit=0.5),
    "hadamard": lambda x: hadamard.fn(x, scale=0.3),
}


@points(*KERNELS)
def test_within_the_budgets_of_the_suite(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("width", [2, 64, 2048])
def test_a_row_is_the_same_bits_at_any_place_of_any_batch(
    call: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype
) -> None:
    """Rows that are no multiple of a vector, and batches large enough that threads share them."""
    x = (3 * torch.randn(77, width, generator=torch.Generator().manual_seed(0))).to(dtype)
    together = call(x)
    for start, stop in ((0, 1), (3, 4), (5, 8), (10, 77), (76, 77)):
        assert torch.equal(call(x[start:stop].clone()), together[start:stop]), (start, stop)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("shape", [(77, 1, 2), (77, 5, 6), (300, 3, 64)], ids=str)
def test_a_token_turns_to_the_same_bits_in_any_batch(shape: tuple[int, int, int], layout: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    angle = torch.linspace(0, math.tau, shape[0] * shape[2] // 2).view(shape[0], -1)
    cos, sin = angle.cos(), angle.sin()
    together = rope.fn(x, cos, sin, layout=layout)
    for some in (slice(0, 1), slice(3, 4), slice(5, 8), slice(10, shape[0])):
        assert torch.equal(rope.fn(x[some], cos[some], sin[some], layout=layout), together[some]), some


@pytest.mark.parametrize("kernel", [rms_norm, add_rms_norm], ids=lambda k: k.op)
def test_a_row_too_long_to_be_summed_by_one_thread_is_refused(kernel: Kernel) -> None:
    (row,) = kernel.requires
    assert row.test(Signature(kernel.op, {}, axes={"D": 32768}), Facts()) == Accepted()
    assert isinstance(row.test(Signature(kernel.op, {}, axes={"D": 32769}), Facts()), Rejected)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.op)
def test_no_kernel_that_claims_graph_safe_waits_for_its_device(kernel: Kernel) -> None:
    assert "graph_safe" in kernel.provides
    args = arguments(kernel.op, smoke(kernel.op)[0])
    with torch.inference_mode(), NeverWaits():
        kernel.fn(**args)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.op)
def test_what_needs_no_conversion_is_not_written_in_place(kernel: Kernel, dtype: str) -> None:
    """A float32 input is its own float32 form: work done in place there would be done in the caller's memory."""
    for sample in smoke(kernel.op):
        args = arguments(kernel.op, sample, dtype)
        before = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
        returned = kernel.fn(**args)
        for name, value in before.items():
            assert torch.equal(args[name].nan_to_num(), value.nan_to_num()), (sample.id, name)
        for out in returned if isinstance(returned, tuple) else (returned,):
            owners = [n for n in before if out.numel() and out.data_ptr() == args[n].data_ptr()]
            assert out.is_contiguous()
            assert not owners, (sample.id, owners)


def test_a_weight_of_another_dtype_is_widened_and_not_narrowed() -> None:
    x, weight = torch.full((1, 4), 1.0, dtype=torch.float64), torch.full((4,), 1 / 3)
    y = rms_norm.fn(x, weight, eps=0.0)
    assert y.dtype == torch.float64
    assert y[0, 0].item() == pytest.approx(weight[0].double().item(), rel=1e-15)


def test_every_elementary_op_has_a_kernel() -> None:
    assert {k.op for k in KERNELS} == {name for name, spec in specs().items() if spec.group == "elementary"}
