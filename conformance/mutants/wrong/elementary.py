"""Norms, rope, the gated activation, the Hadamard transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args
from glm5_hal.conformance.mutants.wrong.base import Wrong, bodied


def other_layout(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return honest.rope_by_parts(x, cos, sin, "half" if layout == "interleaved" else "interleaved")


def always_interleaved(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return honest.rope_by_parts(x, cos, sin, "interleaved")


def backwards(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return honest.rope_by_parts(x, cos, -sin, layout)


def de_interleaved(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    y = honest.rope_by_parts(x, cos, sin, layout)
    return torch.cat([y[..., 0::2], y[..., 1::2]], -1) if layout == "interleaved" else y


def in_bfloat16(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    half = torch.bfloat16
    return honest.rope_by_parts(x.to(half), cos.to(half), sin.to(half), layout).float()


def tables_of_first_token(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    return honest.rope_by_parts(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin), layout)


TURNS = {
    "the other layout": other_layout,
    "one layout for both": always_interleaved,
    "turned backwards": backwards,
    "result de-interleaved": de_interleaved,
    "tables of the first token": tables_of_first_token,
    "nothing turned": lambda x, cos, sin, layout: x,
    "only the first half of the pairs": lambda x, cos, sin, layout: torch.cat(
        [honest.rope_by_parts(x, cos, sin, layout)[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]], -1
    ),
}


def elementary() -> list[Wrong]:
    mean = honest.rms(lambda x: (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True))
    norms: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
        "no eps": lambda x, w, eps: honest.NORMS["rsqrt"](x, w, 0.0),
        "eps outside the root": lambda x, w, eps: x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + eps) * w.float(),
        "gain in float16": lambda x, w, eps: honest.NORMS["rsqrt"](x, w.to(torch.float16), eps),
        "eps 1e-6": lambda x, w, eps: honest.NORMS["rsqrt"](x, w, 1e-6),
        "mean subtracted": mean,
        "weight plus one": lambda x, w, eps: honest.NORMS["rsqrt"](x, w.float() + 1, eps),
        "no weight": lambda x, w, eps: honest.NORMS["rsqrt"](x, torch.ones_like(w), eps),
        "sum for mean": honest.rms(lambda x: (x * x).sum(-1, keepdim=True)),
        "squares in bfloat16": honest.rms(lambda x: (x * x).to(torch.bfloat16).float().mean(-1, keepdim=True)),
        "row scale of the batch": honest.rms(lambda x: (x * x).mean() if x.numel() else x[..., :1]),
    }  # fmt: skip
    found = [bodied(op, name, make(norm), dtypes=("*",)) for name, norm in norms.items()
             for op, make in (("rms_norm", honest.rms_norm), ("add_rms_norm", honest.add_rms_norm))]  # fmt: skip
    found += [bodied("rope", name, honest.rope(turn)) for name, turn in TURNS.items()]
    found.append(bodied("rope", "in bfloat16", honest.rope(in_bfloat16)))
    silu = torch.nn.functional.silu
    found += [
        bodied("add_rms_norm", "residual left out of the stream", lambda a: (honest.add_rms_norm()(a)[0], a.x.clone())),
        bodied("add_rms_norm", "stream is the norm", lambda a: (honest.add_rms_norm()(a)[0],) * 2, "form"),
        bodied("silu_and_mul", "gate and up swapped", _swapped_halves),
        bodied("silu_and_mul", "interleaved gate and up", _interleaved_halves),
        bodied("silu_and_mul", "gelu", honest.silu_and_mul(torch.nn.functional.gelu)),
        bodied("silu_and_mul", "sigmoid alone", honest.silu_and_mul(torch.sigmoid)),
        bodied("silu_and_mul", "overflow of exp", honest.silu_and_mul(lambda g: g * torch.exp(g) / (1 + torch.exp(g)))),
        bodied("silu_and_mul", "gate cut from below", honest.silu_and_mul(gate=lambda g, m: g.clamp(-m, m))),
        bodied("silu_and_mul", "up cut from above only", honest.silu_and_mul(up=lambda u, m: u.clamp(max=m))),
        bodied("silu_and_mul", "no clamp", honest.silu_and_mul(gate=lambda g, m: g, up=lambda u, m: u)),
        bodied("silu_and_mul", "NaN clamped away", honest.silu_and_mul(up=lambda u, m: torch.where(u > -m, torch.where(u < m, u, m), -m)), ("accuracy", "nonfinite")),
        bodied("silu_and_mul", "silu clamped instead", honest.silu_and_mul(silu, gate=lambda g, m: g, up=lambda u, m: u.clamp(-m, m))),
        bodied("hadamard", "stages in bfloat16", _stage_by_stage),
        bodied("hadamard", "no scale", _unscaled),
        bodied("hadamard", "other order of rows", honest.hadamard(lambda D: honest.sylvester(D).flip(0))),
        bodied("hadamard", "twice", lambda a: honest.hadamard()(Args(x=honest.hadamard()(a), scale=1.0))),
        bodied("hadamard", "last stage left out", honest.hadamard(lambda D: torch.kron(torch.eye(2), honest.sylvester(D // 2)) if D > 1 else torch.ones(1, 1))),
    ]  # fmt: skip
    return found


def _swapped_halves(a: Args) -> Any:
    return honest.silu_and_mul()(Args(x=torch.cat(a.x.chunk(2, -1)[::-1], -1), limit=a.limit))


def _interleaved_halves(a: Args) -> Any:
    return honest.silu_and_mul()(Args(x=torch.cat([a.x[..., 0::2], a.x[..., 1::2]], -1), limit=a.limit))


def _stage_by_stage(a: Args) -> Any:
    D = a.x.shape[-1]
    y = a.x.reshape(-1, D)
    for _ in range(D.bit_length() - 1):
        y = torch.cat((y[:, 0::2] + y[:, 1::2], y[:, 0::2] - y[:, 1::2]), -1)
    return (y * a.scale).reshape(a.x.shape)


def _unscaled(a: Args) -> Any:
    return honest.hadamard()(Args(x=a.x, scale=1.0))
