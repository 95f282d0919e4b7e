"""Norms."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from glm5_hal.backend import kernel


@kernel("rms_norm", "torch", provides=("deterministic", "batch_invariant", "graph_safe"))
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    if x.dtype.itemsize >= 4 and weight.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
