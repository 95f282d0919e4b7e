"""The two prologs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants.honest.caches import write
from glm5_hal.conformance.mutants.honest.calls import Args, Body, Product
from glm5_hal.conformance.mutants.honest.elementary import NORMS, rope_by_parts, sylvester
from glm5_hal.conformance.mutants.honest.products import matmul, sequential_sum

WRITE = write()


@dataclass(frozen=True)
class Prolog:
    """What the two prologs may do in more than one way; the defaults are right."""

    keep: bool = False
    product: Product = matmul
    turn: Callable[[Tensor, Tensor, Tensor, str], Tensor] = rope_by_parts
    norm: Callable[[Tensor, Tensor, float], Tensor] = NORMS["rsqrt"]
    store: Body = WRITE

    def stored(self, v: Tensor, like: Tensor) -> Tensor:
        return v if self.keep else v.to(like.dtype).float()


def mla_prolog(
    how: Prolog = Prolog(),
    eps: Callable[[float], float] = lambda eps: eps,
    heads: Callable[[Tensor, int], tuple[Tensor, Tensor]] = lambda q, nope: (q[..., :nope], q[..., nope:]),
    norm_rope: bool = False,
    turn_key: bool = True,
    latent_normed: bool = True,
) -> Body:
    def body(a: Args) -> tuple[Tensor, Tensor]:
        H, K, L = a.w_uk.shape
        x = a.x.float()
        c = how.norm(how.stored(how.product(x, a.w_q_a.float()), a.x), a.q_a_norm, eps(a.eps))
        q_c = c.to(a.x.dtype)
        c = how.stored(c, a.x)
        q = how.stored(how.product(c, a.w_q_b.float()), a.x).reshape(len(x), H, len(a.w_q_b) // H)
        nope, pe = heads(q, K)
        absorbed = torch.stack([how.product(nope[:, h], a.w_uk[h].float().T.contiguous()) for h in range(H)], 1)
        pe = how.turn(pe, a.cos, a.sin, a.layout)
        kv = how.stored(how.product(x, a.w_kv_a.float()), a.x)
        latent, k_pe = kv[:, :L], kv[:, L:]
        if latent_normed:
            latent = how.norm(latent, a.kv_a_norm, eps(a.eps))
        if norm_rope:
            k_pe = how.norm(k_pe, torch.ones(k_pe.shape[1]), a.eps)
        if turn_key:
            k_pe = how.turn(k_pe, a.cos, a.sin, a.layout)
        rows = {"kv_c": how.stored(latent, a.x), "k_pe": how.stored(k_pe, a.x)}
        how.store(_cache_args(a, kv_cache=a.kv_cache, rope_cache=a.rope_cache, **rows))
        return torch.cat([absorbed, pe], -1).to(a.x.dtype), q_c

    return body


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps)


def layer_norm_by_moments(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Two passes over the data, the second about the mean of the first."""
    mean = sequential_sum(x)[:, None] / x.shape[-1]
    variance = sequential_sum((x - mean).square())[:, None] / x.shape[-1]
    return (x - mean) / (variance + eps).sqrt() * weight.float() + bias.float()


def indexer_prolog(
    how: Prolog = Prolog(),
    norm: Callable[[Tensor, Tensor, Tensor, float], Tensor] = layer_norm,
    rope_first: bool = True,
    weights: Callable[[Tensor, Args], Tensor] = lambda w, a: w * a.weights_scale,
    turned: tuple[str, ...] = ("q", "k"),
    layout: Callable[[str], str] = lambda layout: layout,
    mixed: Callable[[Args], tuple[bool, bool]] = lambda a: (a.hadamard, a.hadamard),
    hadamard_scale: Callable[[int], float] = lambda D: D**-0.5,
) -> Body:
    def body(a: Args) -> tuple[Tensor, Tensor]:
        T, D, R = len(a.x), a.w_k.shape[0], 2 * a.cos.shape[-1]
        q = how.stored(how.product(a.q_c.float(), a.w_q_b.float()), a.x).reshape(T, a.num_heads, D)
        k = norm(how.stored(how.product(a.x.float(), a.w_k.float()), a.x), a.k_norm_weight, a.k_norm_bias, a.eps)
        k = how.stored(k, a.x)

        def turn(v: Tensor) -> Tensor:
            head, rest = (v[..., :R], v[..., R:]) if rope_first else (v[..., D - R :], v[..., : D - R])
            head = how.turn(head, a.cos, a.sin, layout(a.layout))
            return how.stored(torch.cat([head, rest] if rope_first else [rest, head], -1), a.x)

        q, k = (turn(v) if name in turned else v for name, v in (("q", q), ("k", k)))
        mix_q, mix_k = mixed(a)
        if mix_q:
            q = q @ sylvester(D) * hadamard_scale(D)
        if mix_k:
            k = how.stored(k @ sylvester(D) * hadamard_scale(D), a.x)
        how.store(_cache_args(a, k=k, index_cache=a.index_cache))
        return q.to(a.x.dtype), weights(how.product(a.x.float(), a.w_weights.float()), a)

    return body


def _cache_args(a: Args, **more: Any) -> Args:
    return SimpleNamespace(slot_mapping=a.slot_mapping, cache_format=a.cache_format, **more)
