"""kunlun_ops' norms and activation as kernels of ours, by the calls of vLLM-Kunlun at 09869ee. It is closed; that an
activation takes gate before up is known by its standing in for vLLM's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.needs import ALIKE, FLOATS
from glm5_hal.capability import dtype, one_of

PROVIDER = "kunlun_ops"

#: What its calls give an activation.
HALVES = ("bfloat16", "float16")


def _library() -> Any:
    return import_module("kunlun_ops")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


@kernel("rms_norm", PROVIDER, requires=(dtype("x", *FLOATS), ALIKE))
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        _library().rmsnorm(_rows(x), weight.contiguous(), _rows(y), eps)
    return y


@kernel("add_rms_norm", PROVIDER, requires=(dtype("x", *FLOATS), ALIKE))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    y, h = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    if x.numel():
        given = (_rows(x), _rows(residual), weight.contiguous(), _rows(y), eps)
        _library().add_rmsnorm(*given, residual_output=_rows(h))
    return y, h


@kernel("silu_and_mul", PROVIDER, requires=(dtype("x", *HALVES), one_of("limit", None)))
def silu_and_mul(x: Tensor, *, limit: float | None = None) -> Tensor:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if y.numel():
        _library().swiglu(x=_rows(x), y=_rows(y))
    return y
