"""Norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glm5_hal.backend import kernel


@kernel("rms_norm", "torch", provides=("deterministic", "batch_invariant", "graph_safe"))
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps)


@kernel("add_rms_norm", "torch", provides=("deterministic", "batch_invariant", "graph_safe"))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    h = (x + residual).contiguous()
    return _rms_norm(h, weight, eps), h


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype).contiguous()
