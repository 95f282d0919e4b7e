"""Kernels of our own. Provider "native" comes before glm5-hal's plain-torch kernels in automatic choice."""

from __future__ import annotations

import torch
from glm5_hal import kernel
from glm5_hal.capability import dtype
from torch import Tensor


# REPLACE THIS KERNEL by a call of yours. What a kernel cannot take is data, in `requires`: then another kernel serves
# the call, `glm5-hal explain` says why, and conformance says UNSUPPORTED. Accepting a call and raising is a failure.
# What a kernel holds is said in `provides`, and conformance takes it at its word.
@kernel(
    "rms_norm",
    "native",
    requires=[dtype("x", "bfloat16", "float16", "float32")],
    provides=["deterministic"],
)
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)
