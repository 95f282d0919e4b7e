"""rms_norm and add_rms_norm by the vendor's ops of those names.

npu_rms_norm takes a gain in float32 beside narrower activations; npu_add_rms_norm does not, nor an empty tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends.ascend.needs import A2, A2_A3, A3, A5, floats, has
from glm5_hal.capability import arch, when
from glm5_hal.signature import Signature


def _one_dtype(call: Signature) -> bool:
    x, weight = call.tensors["x"], call.tensors["weight"]
    return x is None or weight is None or x.dtype == weight.dtype


@kernel("rms_norm", "aclnn", requires=(A2_A3, *has("npu_rms_norm"), *floats("x", "weight")), provides=("graph_safe",))
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    rows = x if x.dim() > 1 else x[None]  # it takes two dims or more
    y: Tensor = torch.ops.npu.npu_rms_norm(rows, weight, eps)[0]
    return y.view(x.shape)


@kernel(
    "add_rms_norm",
    "aclnn",
    requires=(
        arch(A2, A3, A5),
        *has("npu_add_rms_norm"),
        *floats("x", "weight"),
        when(
            _one_dtype,
            "weight has the dtype of x: this op has no float32 gain beside narrower activations",
            "convert weight to the dtype of x, or use rms_norm after an addition",
            reads=(("x", "dtype"), ("weight", "dtype")),
        ),
    ),
    provides=("graph_safe",),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape)
    y, _, h = torch.ops.npu.npu_add_rms_norm(x, residual, weight, eps)
    return y, h
