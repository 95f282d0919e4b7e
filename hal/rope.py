"""Tables of cosines and sines, exact enough for long contexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glm5_hal.errors import HalError

if TYPE_CHECKING:
    import torch


def rope_tables(
    positions: torch.Tensor, rotary_dim: int, theta: float, *, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cos`` and ``sin``, ``[T, rotary_dim/2]`` in ``dtype`` (None: fp32), with the angles computed in float64.

    fp32 angles are off by up to 0.01 at position 200,000, enough to change which keys the indexer selects
    (spec section 14.1). Plain RoPE; scaled variants build their own tables.
    """
    import torch

    if rotary_dim % 2 or rotary_dim <= 0 or theta <= 0:
        raise HalError(
            "SCALAR", f"rope_tables: rotary_dim={rotary_dim}, theta={theta}", fix="rotary_dim is even, theta positive"
        )
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device) / rotary_dim
    angles = positions.to(torch.float64)[:, None] * theta**-exponent
    return angles.cos().to(dtype or torch.float32), angles.sin().to(dtype or torch.float32)
