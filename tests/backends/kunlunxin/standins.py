"""A stand-in for kunlun_ops, which is closed: names and order of arguments as vLLM-Kunlun and sglang-kunlun call it,
in plain torch. It says nothing of what the real one computes on an XPU."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from adapters import put
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


def kunlun_ops(patch: pytest.MonkeyPatch, version: str = "0.1.58+ee39020a") -> ModuleType:
    return put(patch, "kunlun_ops", __version__=version, rmsnorm=rmsnorm, add_rmsnorm=add_rmsnorm, swiglu=swiglu)


def rmsnorm(
    x: Tensor,
    weight: Tensor,
    output: Tensor,
    eps: float,
    interweave: bool = False,
    store_output_before_norm: bool = True,
    bias: None = None,
    residual_output: None = None,
    output_max: None = None,
) -> None:
    _sound(x, output, weight)
    _plain(interweave, bias, residual_output, output_max)
    output.copy_(_normed(x.float(), weight, eps))


def add_rmsnorm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    output: Tensor,
    eps: float,
    interweaved: bool = False,
    store_output_before_norm: bool = True,
    bias: None = None,
    smooth: None = None,
    residual_output: Tensor | None = None,
    output_max: None = None,
) -> None:
    assert residual_output is not None
    assert store_output_before_norm
    _sound(x, y, weight)
    _sound(output, residual_output, weight)
    _plain(interweaved, bias, smooth, output_max)
    residual_output.copy_((x.float() + y.float()).to(x.dtype))
    output.copy_(_normed(residual_output.float(), weight, eps))


def swiglu(x: Tensor, y: Tensor) -> None:
    assert x.dtype in HALVES
    assert x.dtype == y.dtype
    assert x.is_contiguous()
    assert y.is_contiguous()
    gate, up = x.float().chunk(2, -1)
    y.copy_(gate / (1.0 + torch.exp(-gate)) * up)


def _sound(x: Tensor, y: Tensor, weight: Tensor) -> None:
    assert x.dim() == 2
    assert x.shape == y.shape
    assert weight.shape == x.shape[1:]
    assert x.dtype == y.dtype == weight.dtype
    assert x.dtype in FLOATS
    for each in (x, y, weight):
        assert each.is_contiguous(), "it takes no gaps"


def _plain(*rest: object) -> None:
    assert not any(rest), "more than was asked of the stand-in"


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
