"""What the prologs share: rope tables, rope layout and weight format as arguments."""

from __future__ import annotations

from glm5_hal.ops._rope import LAYOUTS
from glm5_hal.spec import Arg, Scalar

#: T tokens, I = half the rope dims.
ROPE_TABLES = (
    Arg("cos", "T I", "A", "cosines of each token's rope angles"),
    Arg("sin", "T I", "A", "sines of each token's rope angles"),
)

LAYOUT = Scalar("layout", "which dims make a pair: (2i, 2i+1), or (i, i + R/2)", choices=LAYOUTS)

WEIGHT_FORMAT = Scalar("weight_format", "how a backend has prepared the weights (glm5_hal.prepare); plain: not at all")
