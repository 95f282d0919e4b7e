"""What several libraries ask of a call."""

from __future__ import annotations

from glm5_hal.capability import when
from glm5_hal.signature import Signature

FLOATS = ("float32", "bfloat16", "float16")


def _alike(call: Signature) -> bool:
    x, weight = call.tensors["x"], call.tensors["weight"]
    return x is None or weight is None or x.dtype == weight.dtype


#: Of a norm.
ALIKE = when(
    _alike,
    "the gain has the activations' dtype",
    "convert the weight once, or use another kernel",
    reads=(("x", "dtype"), ("weight", "dtype")),
)
