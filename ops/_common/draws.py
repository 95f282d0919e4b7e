"""Sample tensors that several ops draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm5_hal.spec import Draw


def fine(draw: Draw, *shape: int, dtype: str, scale: float = 1.0) -> Tensor:
    """`draw.normal` with 16 bits, rounded to the dtype: computing with fewer bits than the dtype has (a float32 product
    in bfloat16 or in a tensor core's short format) then shows."""
    if dtype == "bfloat16":
        coarse: Tensor = draw.normal(*shape, dtype=dtype, scale=scale)
        return coarse
    parts = (draw.normal(*shape, dtype="float64", scale=s) for s in (scale, scale * 2.0**-9))
    return torch.stack([*parts]).sum(0).to(getattr(torch, dtype))


def weight(draw: Draw, outputs: int, inputs: int, dtype: str) -> Tensor:
    """A projection [outputs, inputs] that keeps the size of what goes through it, within a factor of two."""
    w: Tensor = draw.normal(outputs, inputs, dtype=dtype, scale=weight_scale(inputs))
    return w


def weight_scale(inputs: int) -> float:
    """The power of two nearest to inputs^-0.5."""
    return 2.0 ** -round(math.log2(inputs) / 2)
