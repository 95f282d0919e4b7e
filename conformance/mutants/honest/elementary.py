"""Norms, rope, the gated activation, the Hadamard transform."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants.honest.calls import Args, Body, Product
from glm5_hal.conformance.mutants.honest.products import matmul, pairwise_sum, sequential_sum


def rms(
    mean: Callable[[Tensor], Tensor] = lambda x: (x * x).mean(-1, keepdim=True),
    root: Callable[[Tensor], Tensor] = torch.rsqrt,
    twice: bool = False,
    wide: torch.dtype = torch.float32,
) -> Callable[[Tensor, Tensor, float], Tensor]:
    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = x.to(wide) * root(mean(x.to(wide)) + eps)
        if twice:
            normed = normed.to(x.dtype).to(wide)
        return normed * weight.to(wide)

    return norm


def sequential_mean(x: Tensor) -> Tensor:
    return sequential_sum(x * x)[..., None] / x.shape[-1]


NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rsqrt": rms(),
    "1/sqrt, sequential": rms(sequential_mean, lambda v: 1 / v.sqrt()),
    "sum before division, pairwise": rms(lambda x: pairwise_sum(x * x)[..., None] / x.shape[-1], twice=True),
    "rounded before the weight": rms(twice=True),
    "in double": rms(wide=torch.float64),
    "by the vector norm": rms(lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]),
    "scaled by sqrt(D)": lambda x, w, eps: (
        x.float() * (math.sqrt(x.shape[-1]) / (x.float().square().sum(-1, keepdim=True) + x.shape[-1] * eps).sqrt())
        * w.float()
    ),
}  # fmt: skip


def rms_norm(norm: Callable[[Tensor, Tensor, float], Tensor] = NORMS["rsqrt"]) -> Body:
    return lambda a: norm(a.x, a.weight, a.eps).to(a.x.dtype)


def add_rms_norm(norm: Callable[[Tensor, Tensor, float], Tensor] = NORMS["rsqrt"], stored: bool = True) -> Body:
    """``stored``: the norm is of the rounded sum, else of the fp32 one."""

    def body(a: Args) -> tuple[Tensor, Tensor]:
        total = a.x.float() + a.residual.float()
        h = total.to(a.x.dtype)
        return norm(h if stored else total, a.weight, a.eps).to(a.x.dtype), h

    return body


def rope_by_parts(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """x·cos + turned(x)·sin, with tables as wide as x."""
    half = x.shape[-1] // 2
    shape = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
    if layout == "half":
        c, s = (torch.cat([t, t], -1) for t in (cos, sin))
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    else:
        c, s = (t.repeat_interleave(2, -1) for t in (cos, sin))
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)
    return x * c.reshape(shape) + turned * s.reshape(shape)


def rope_complex(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    half = x.shape[-1] // 2
    if x.numel() == 0:
        return torch.zeros(x.shape)
    lead = x.shape[:-1]
    pairs = x.reshape(*lead, half, 2) if layout == "interleaved" else x.reshape(*lead, 2, half).transpose(-1, -2)
    turn = torch.complex(cos, sin).reshape(len(x), *[1] * (x.dim() - 2), half)
    y = torch.view_as_real(torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format)) * turn)
    return (y if layout == "interleaved" else y.transpose(-1, -2)).reshape(x.shape)


def rope(
    turn: Callable[[Tensor, Tensor, Tensor, str], Tensor] = rope_by_parts, wide: torch.dtype = torch.float32
) -> Body:
    return lambda a: turn(a.x.to(wide), a.cos.to(wide), a.sin.to(wide), a.layout).to(a.x.dtype)


def silu_by_division(g: Tensor) -> Tensor:
    return g / (1 + torch.exp(-g))


def silu_by_tanh(g: Tensor) -> Tensor:
    return 0.5 * g * (1 + torch.tanh(0.5 * g))


def silu_base_2(g: Tensor) -> Tensor:
    return g / (1 + torch.exp2(-g * math.log2(math.e)))


def silu_and_mul(
    silu: Callable[[Tensor], Tensor] = torch.nn.functional.silu,
    twice: bool = False,
    gate: Callable[[Tensor, float], Tensor] = lambda g, limit: g.clamp(max=limit),
    up: Callable[[Tensor, float], Tensor] = lambda u, limit: u.clamp(-limit, limit),
) -> Body:
    def body(a: Args) -> Any:
        g, u = a.x.float().chunk(2, -1)
        if a.limit is not None:
            g, u = gate(g, a.limit), up(u, a.limit)
        first = silu(g)
        return ((first.to(a.x.dtype).float() if twice else first) * u).to(a.x.dtype)

    return body


def sylvester(D: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < D:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def hadamard(matrix: Callable[[int], Tensor] = sylvester, product: Product = matmul, scale_first: bool = False) -> Body:
    def body(a: Args) -> Tensor:
        h = matrix(a.x.shape[-1])
        x = a.x.float().reshape(-1, a.x.shape[-1])
        y = product(x * a.scale, h) if scale_first else product(x, h) * a.scale
        return y.reshape(a.x.shape).to(a.x.dtype)

    return body
