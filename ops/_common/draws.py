"""Sample tensors that several ops draw."""

from __future__ import annotations

import math

from torch import Tensor

from glm5_hal.spec import Draw


def weight(draw: Draw, outputs: int, inputs: int, dtype: str) -> Tensor:
    """A projection [outputs, inputs] that keeps the size of what goes through it, within a factor of two."""
    w: Tensor = draw.normal(outputs, inputs, dtype=dtype, scale=weight_scale(inputs))
    return w


def weight_scale(inputs: int) -> float:
    """The power of two nearest to inputs^-0.5."""
    return 2.0 ** -round(math.log2(inputs) / 2)
