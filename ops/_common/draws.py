"""Sample tensors that several ops draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm5_hal.spec import Draw


def weight(draw: Draw, outputs: int, inputs: int, dtype: str) -> Tensor:
    """A projection [outputs, inputs] that keeps the size of what goes through it, within a factor of two."""
    w: Tensor = draw.normal(outputs, inputs, dtype=dtype, scale=weight_scale(inputs))
    return w


def weight_scale(inputs: int) -> float:
    """The power of two nearest to inputs^-0.5."""
    return 2.0 ** -round(math.log2(inputs) / 2)


def mirrored(draw: Draw, rows: int, inputs: int, dtype: str) -> Tensor:
    """Rows of which the second half repeats the first, positive integers: the input of `cancelling` weights."""
    half = 1.0 + draw.integers(0, 31, rows, inputs // 2)
    return _joined(half, half, inputs, dtype)


def cancelling(draw: Draw, outputs: int, inputs: int, dtype: str) -> Tensor:
    """Integer weights [outputs, inputs] that take `mirrored` rows to small integers by way of large partial sums.

    Exact in fp32 in any order. An accumulator of the storage dtype loses the last digits half way, and the result is
    made of these; where partial sums are as large as the result, such an accumulator hides behind its rounding.
    """
    first = 1.0 + draw.integers(0, 31, outputs, inputs // 2)
    left = draw.integers(-2, 3, outputs, inputs // 2) * (draw.integers(0, 4, outputs, inputs // 2) == 0)
    return _joined(first, left - first, inputs, dtype)


def _joined(first: Tensor, second: Tensor, inputs: int, dtype: str) -> Tensor:
    odd = first.new_zeros(len(first), inputs % 2)
    return torch.cat([first, second, odd], -1).to(getattr(torch, dtype))
