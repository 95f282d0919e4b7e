"""torch_mlu_ops' norms and activation as kernels of ours. By its documentation gains have the activations' dtype, gate
comes before up, and the exact sigmoid is one of two."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.needs import ALIKE, FLOATS
from glm5_hal.capability import dtype, one_of


def _library() -> Any:
    return import_module("torch_mlu_ops")


@kernel("rms_norm", "tmo", requires=(dtype("x", *FLOATS), ALIKE))
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    y: Tensor = _library().fused_rms_norm(x.contiguous(), None, weight.contiguous(), None, None, eps, False)
    return y


@kernel("add_rms_norm", "tmo", requires=(dtype("x", *FLOATS), ALIKE))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        nothing = torch.empty_like(x, memory_format=torch.contiguous_format)
        return nothing, nothing.clone()
    given = (x.contiguous(), residual.contiguous(), weight.contiguous())
    y, h = _library().fused_rms_norm(*given, None, None, eps, True)
    return y, h


@kernel("silu_and_mul", "tmo", requires=(dtype("x", *FLOATS), one_of("limit", None)))
def silu_and_mul(x: Tensor, *, limit: float | None = None) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    y: Tensor = _library().active(x.contiguous(), "silu", True, high_precision=True)
    return y
