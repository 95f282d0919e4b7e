"""Rotary embedding, gated activation and Hadamard transform.

Each number is the same bits wherever its row stands in a batch. That is true of sums, products and torch.exp; it is not
of torch.sigmoid, F.silu and products of complex numbers, which a CPU rounds otherwise at the end of a vector loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._torch.numbers import accumulation

ROW_BY_ROW = ("deterministic", "batch_invariant", "graph_safe")


@kernel("rope", "torch", provides=ROW_BY_ROW)
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "interleaved") -> Tensor:
    dtype = accumulation(x)
    per_token = (x.shape[0], *[1] * (x.dim() - 2), cos.shape[1])
    c, s = cos.to(dtype).reshape(per_token), sin.to(dtype).reshape(per_token)
    wide, y = x.to(dtype), torch.empty_like(x, memory_format=torch.contiguous_format)
    half = cos.shape[1]
    (a, b), (ya, yb) = (
        (t[..., 0::2], t[..., 1::2]) if layout == "interleaved" else (t[..., :half], t[..., half:]) for t in (wide, y)
    )
    ya.copy_(a * c - b * s)
    yb.copy_(b * c + a * s)
    return y


@kernel("silu_and_mul", "torch", provides=ROW_BY_ROW)
def silu_and_mul(x: Tensor, *, limit: float | None = None) -> Tensor:
    gate, up = (t.to(accumulation(x)) for t in x.chunk(2, -1))
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    below = torch.neg(gate).exp_().add_(1.0)
    return torch.div(gate, below, out=below).mul_(up).to(x.dtype).contiguous()


@kernel("hadamard", "torch", provides=ROW_BY_ROW)
def hadamard(x: Tensor, *, scale: float) -> Tensor:
    D = x.shape[-1]
    y = x.to(accumulation(x)).reshape(x.numel() // D, D)
    for _ in range(D.bit_length() - 1):  # each pass is the same: neighbours go to the two halves
        a, b = y[:, 0::2], y[:, 1::2]
        y = torch.cat((a + b, a - b), -1)
    return y.mul(scale).to(x.dtype).view(x.shape).contiguous()
