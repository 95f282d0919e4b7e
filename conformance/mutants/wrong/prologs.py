"""The two prologs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args, Prolog, Quantiser
from glm5_hal.conformance.mutants.wrong.attention import in_storage
from glm5_hal.conformance.mutants.wrong.base import FP32, Wrong, bodied
from glm5_hal.conformance.mutants.wrong.caches import any_scale
from glm5_hal.conformance.mutants.wrong.elementary import TURNS


def the_prologs() -> list[Wrong]:
    shared = {f"rope: {name}": Prolog(turn=turn) for name, turn in TURNS.items()}
    shared |= {
        "products in bfloat16 accumulators": Prolog(product=in_storage),
        "stores nothing": Prolog(store=lambda a: None),
        "-1 stored in slot 0": Prolog(store=honest.write(place=lambda slot: max(slot, 0))),
        "scales no power of two": Prolog(store=honest.write(Quantiser(power=any_scale))),
        "twice the scale": Prolog(store=honest.write(Quantiser(power=lambda *a: 2 * honest.power_by_bits(*a)))),
        "scale and rope swapped": Prolog(store=honest.write(fields=lambda f: (f[0], *reversed(f[1:])))),
    }
    found = [bodied(op, name, make(how)) for name, how in shared.items()
             for op, make in (("mla_prolog", honest.mla_prolog), ("indexer_prolog", honest.indexer_prolog))
             if (op, name) not in RIGHT_THERE]  # fmt: skip
    mla = {
        "eps 1e-6": honest.mla_prolog(eps=lambda eps: 1e-6),
        "rope part first in a head": honest.mla_prolog(heads=lambda q, nope: (q[..., q.shape[-1] - nope :], q[..., : q.shape[-1] - nope])),
        "rope key normed": honest.mla_prolog(norm_rope=True),
        "rope key not turned": honest.mla_prolog(turn_key=False),
        "latent not normed": honest.mla_prolog(latent_normed=False),
        "q_c before its norm": _unnormed_q_c,
        "norm's weights plus one": honest.mla_prolog(Prolog(norm=lambda x, w, eps: honest.NORMS["rsqrt"](x, w.float() + 1, eps))),
        "wrong beyond the first head": _first_head_for_all,
    }  # fmt: skip
    found += [bodied("mla_prolog", name, body) for name, body in mla.items()]
    rms = honest.NORMS["rsqrt"]
    index = {
        "rms norm for layer norm": honest.indexer_prolog(norm=lambda x, w, b, eps: rms(x, w, eps) + b.float()),
        "no norm bias": honest.indexer_prolog(norm=lambda x, w, b, eps: honest.layer_norm(x, w, torch.zeros_like(b), eps)),
        "variance in one pass": honest.indexer_prolog(norm=_one_pass),
        "eps 1e-5": honest.indexer_prolog(norm=lambda x, w, b, eps: honest.layer_norm(x, w, b, 1e-5)),
        "rope part last": honest.indexer_prolog(rope_first=False),
        "queries not turned": honest.indexer_prolog(turned=("k",)),
        "keys not turned": honest.indexer_prolog(turned=("q",)),
        "always half": honest.indexer_prolog(layout=lambda layout: "half"),
        "weights unscaled": honest.indexer_prolog(weights=lambda w, a: w),
        "weights scaled by heads alone": honest.indexer_prolog(weights=lambda w, a: w * a.num_heads**-0.5),
        "weights in bfloat16": honest.indexer_prolog(weights=lambda w, a: (w * a.weights_scale).to(torch.bfloat16).float()),
        "weights without their sign": honest.indexer_prolog(weights=lambda w, a: (w * a.weights_scale).abs()),
        "no hadamard": honest.indexer_prolog(mixed=lambda a: (False, False)),
        "hadamard on queries only": honest.indexer_prolog(mixed=lambda a: (a.hadamard, False)),
        "hadamard unscaled": honest.indexer_prolog(hadamard_scale=lambda D: 1.0),
        "always hadamard": honest.indexer_prolog(mixed=lambda a: (a.w_k.shape[0] == 128,) * 2),
    }  # fmt: skip
    found += [
        bodied("indexer_prolog", name, body, dtypes=FP32 if "one pass" in name else ("bfloat16",))
        for name, body in index.items()
    ]
    return found


#: Index keys have no rope part.
RIGHT_THERE = frozenset({("indexer_prolog", "scale and rope swapped")})


def _one_pass(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean, square = x.float().mean(-1, keepdim=True), x.float().square().mean(-1, keepdim=True)
    return (x.float() - mean) * torch.rsqrt(square - mean.square() + eps) * weight.float() + bias.float()


def _unnormed_q_c(a: Args) -> Any:
    q, _ = honest.mla_prolog()(a)
    return q, (a.x.float() @ a.w_q_a.float().T).to(a.x.dtype)


def _first_head_for_all(a: Args) -> Any:
    q, q_c = honest.mla_prolog()(a)
    return q[:, :1].repeat(1, q.shape[1], 1), q_c
