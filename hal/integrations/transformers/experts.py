"""MLPs, router and experts over the operators. Their weights in the form that the operators take.

Legend: T tokens, E hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm5_hal import ops
from glm5_hal.ops._common.packed import pack
from glm5_hal.ops._common.products import linear
from glm5_hal.prepared import Prepared, prepare


@dataclass(frozen=True, eq=False)
class Mlp:
    """A gated MLP: gate and up are one product.

    Attributes:
        w_gate_up: [2·I, E], gate's rows first.
        w_down: [E, I].
    """

    w_gate_up: Tensor
    w_down: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., E] to [..., E]."""
        return linear(ops.silu_and_mul(linear(x, self.w_gate_up)), self.w_down)


@dataclass(frozen=True, eq=False)
class Router:
    """Logits in float32, or float64 for such a model: a lower precision changes which experts are chosen."""

    weight: Tensor
    bias: Tensor
    options: dict[str, Any]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, E] to logits [T, experts], weights [T, k] and ids [T, k]."""
        logits = linear(x.to(self.weight.dtype), self.weight)
        return logits, *ops.moe_route(logits, self.bias, **self.options)


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts, as `moe_experts` takes them."""

    weights: Prepared

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor, shared: Tensor) -> Tensor:
        """[T, E] to [T, E]; ``shared [T, E]``, the shared expert's result, is added."""
        out: Tensor = ops.moe_experts(
            x, weights, ids, **self.weights.tensors, shared=shared, weight_format=self.weights.format
        )
        return out


# --- from transformers' modules --------------------------------------------------------------------------------------


def mlp(module: Any) -> Mlp:
    joined = torch.cat([module.gate_proj.weight.detach(), module.up_proj.weight.detach()])
    return Mlp(pack(joined), pack(module.down_proj.weight.detach()))


def router(module: Any) -> Router:
    wide = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
    options = {
        "top_k": module.top_k,
        "n_group": module.num_group,
        "topk_group": module.topk_group,
        "norm_topk_prob": module.norm_topk_prob,
        "routed_scaling_factor": float(module.routed_scaling_factor),
    }
    return Router(pack(module.weight.detach().to(wide)), module.e_score_correction_bias.to(wide), options)


def experts(module: Any, backend: str) -> Experts:
    plain = {"w_gate_up": module.gate_up_proj.detach(), "w_down": module.down_proj.detach()}
    return Experts(prepare("moe_experts", plain, backend=backend))
