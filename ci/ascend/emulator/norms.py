"""npu_rms_norm, npu_add_rms_norm, npu_swiglu.

All three compute in float32 and round once. Golden code of npu_add_rms_norm rounds x1 + x2 to the inputs' dtype before
the norm; it shows this for float16, and here bfloat16 does the same. Assumed where the documents are silent: a NaN or
an infinity takes the way that the formula gives it (the page's "an Inf input gives Inf" holds for the sum; the norm of
a row with an Inf is NaN there). npu_rms_norm's page gives gamma 2 to 8 dims, and its example has 1: 1 to 8 is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constraints import Rules

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)


def rms(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm over gamma's dims in float32, and the reciprocal of the root mean square."""
    x = x.float()
    over = list(range(x.dim() - gamma.dim(), x.dim()))
    rstd = torch.rsqrt(x.square().mean(over, keepdim=True) + epsilon)
    return x * rstd * gamma.float(), rstd


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    rules = Rules("npu_rms_norm", "（beta）torch_npu-npu_rms_norm.md")
    rules.dtype("input", input, *FLOATS)
    rules.dims("input", input, 2, 8)
    _tail(rules, "input", input, gamma)
    pair = gamma.dtype in (input.dtype, torch.float32)
    rules.need(pair, "gamma has input's dtype, or float32 where that is a 16-bit one", [input, gamma])
    y, rstd = rms(input, gamma, epsilon)
    return y.to(input.dtype), rstd


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    rules = Rules("npu_add_rms_norm", "torch_npu-npu_add_rms_norm.md")
    rules.dtype("x1", x1, *FLOATS)
    rules.same_dtype(x1=x1, x2=x2, gamma=gamma)
    rules.dims("x1", x1, 1, 8)
    rules.shape("x2", x2, *x1.shape)
    rules.not_empty(x1=x1, gamma=gamma)
    _tail(rules, "x1", x1, gamma)
    total = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = rms(total, gamma, epsilon)
    return y.to(x1.dtype), rstd, total


def swiglu(input: Tensor, dim: int) -> Tensor:
    rules = Rules("npu_swiglu", "（beta）torch_npu-npu_swiglu.md")
    rules.dtype("input", input, *FLOATS)
    rules.dims("input", input, 1, 8)
    rules.need(-input.dim() <= dim < input.dim(), f"dim is within [{-input.dim()}, {input.dim() - 1}]", dim)
    rules.not_empty(input=input)
    rules.contiguous(input=input)
    rules.need(input.shape[dim] % 2 == 0, "input's size along dim is even", input)
    gate, up = input.float().chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype)


def _tail(rules: Rules, name: str, x: Tensor, gamma: Tensor) -> None:
    tail = 1 <= gamma.dim() <= x.dim() and x.shape[x.dim() - gamma.dim() :] == gamma.shape
    rules.need(tail, f"gamma's shape is that of {name}'s last dims", [x, gamma])


KERNELS = {"npu_rms_norm": rms_norm, "npu_add_rms_norm": add_rms_norm, "npu_swiglu": swiglu}
