"""Chosen keys as the vendor's ops have them. On the device, and no shape depends on a value."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_first(indices: Tensor) -> Tensor:
    """Every row's indices [T, K] that are not -1, in their order, then -1."""
    K = indices.shape[1]
    place = torch.arange(K, dtype=indices.dtype, device=indices.device)
    order = torch.where(indices >= 0, place, place + K).sort(-1).values  # sorting by place needs no stable sort
    return indices.gather(1, (order % K).long())
