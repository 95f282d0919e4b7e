"""What the prologs share: rope tables and the weight format as arguments, sample weights and tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm5_hal.spec import Arg, Draw, Scalar

#: T tokens, I = half the rope dims.
ROPE_TABLES = (
    Arg("cos", "T I", "float32", "cosines of each token's rope angles"),
    Arg("sin", "T I", "float32", "sines of each token's rope angles"),
)

LAYOUT = Scalar("layout", "which dims make a pair: (2i, 2i+1), or (i, i+R/2)", choices=("interleaved", "half"))

WEIGHT_FORMAT = Scalar("weight_format", "how a backend has prepared the weights (glm5_hal.prepare); plain: not at all")


def weight(draw: Draw, outputs: int, inputs: int, dtype: str) -> Tensor:
    """A projection [outputs, inputs] that keeps the size of what goes through it, within a factor of two."""
    return draw.normal(outputs, inputs, dtype=dtype, scale=2.0 ** -round(math.log2(inputs) / 2))


def rotations(draw: Draw, tokens: int, half: int) -> tuple[Tensor, Tensor]:
    """cos and sin with all bits of fp32, so that rounding them shows. No libm: they need not be of one angle."""
    cos, sin = (draw.integers(-(1 << 23), 1 << 23, tokens, half).to(torch.float32) * 2.0**-23 for _ in range(2))
    return cos, sin
