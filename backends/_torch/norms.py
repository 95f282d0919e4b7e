"""Norms."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from glm5_hal.backend import kernel
from glm5_hal.backends._torch.numbers import accumulation
from glm5_hal.capability import limit

CLAIMS = ("deterministic", "batch_invariant", "graph_safe")

#: On a CPU a longer row is summed by several threads where it is alone, and by one where it is not.
ROW = limit("D", 32768)


@kernel("rms_norm", "torch", requires=(ROW,), provides=CLAIMS)
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps)


@kernel("add_rms_norm", "torch", requires=(ROW,), provides=CLAIMS)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    h = (x + residual).contiguous()
    return _rms_norm(h, weight, eps), h


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = accumulation(x)
    return functional.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype).contiguous()
