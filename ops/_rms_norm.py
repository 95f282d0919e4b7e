"""rms_norm: y = x / rms(x) * weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common import gains
from glm5_hal.ops._common.precision import down, stored, up
from glm5_hal.spec import FLOATS, Arg, Calibrated, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample, Scalar


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y = weight · x · rsqrt(mean(x²) + eps), over the last dim.

    GLM-5 uses eps 1e-5 for the layers' norms; the latents' eps (q_a, kv_a) is 1e-5 in the training code and 1e-6 in
    transformers, so it is always an argument.
    """
    x32 = up(x)
    return down(x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * up(weight), x)


def rounded_twice(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """The loosest honest form: the normalised value is stored before it is multiplied by the weight."""
    x32 = up(x)
    normed = stored(x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps), x)
    return down(normed * up(weight), x)


def samples() -> Iterator[Sample]:
    yield Sample("tokens", {"T": 5, "D": 96})
    yield Sample("one", {"T": 1, "D": 1}, tags=frozenset({"edge"}))
    yield Sample("empty", {"T": 0, "D": 64}, tags=frozenset({"edge"}))
    yield Sample("uneven", {"T": 3, "D": 515}, tags=frozenset({"edge"}))
    for name, tokens, dim in (("hidden", 64, 6144), ("q_lora", 64, 2048), ("kv_lora", 256, 512)):
        yield Sample(f"glm5-{name}", {"T": tokens, "D": dim}, "standard", tags=frozenset({"glm5"}))


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    T, D = sample.axes["T"], sample.axes["D"]
    # Rows differ in size by powers of two, so that a scale taken from the wrong row shows.
    x = draw.normal(T, D, dtype=dtype) * (2.0 ** draw.integers(-3, 4, T, 1)).to(getattr(torch, dtype))
    return Inputs({"x": x, "weight": draw.uniform(D, dtype=dtype, low=0.25, high=1.0), "eps": 1e-5})


def fuzz(pick: Pick) -> Sample:
    return Sample("fuzz", {"T": pick.integer(0, 70), "D": pick.integer(1, 1100)})


def cost(axes: Mapping[str, Any]) -> Cost:
    T, D = prod(axes["..."]), axes["D"]
    return Cost(flops=4 * T * D, bytes=axes["itemsize"] * (2 * T * D + D))


SPEC = OpSpec(
    name="rms_norm",
    group="elementary",
    reference=rms_norm,
    emulate=rounded_twice,
    args=(
        Arg("x", "... D", "F", "activations, any leading dims"),
        Arg("weight", "D", "W", "gain, in the activations' dtype or float32"),
    ),
    scalars=(Scalar("eps", "added to the mean square, 1e-5 or 1e-6", low=0.0),),
    outs=(Out("y", "... D", "F", "normalised activations"),),
    dtypes={"F": FLOATS, "W": FLOATS},
    constraints=(gains.as_wide("weight"),),
    rounding="computed in fp32; rounded once at the end, or also before the multiplication by weight",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"y": Calibrated(depth=("D",))},
    cost=cost,
    fuzz=fuzz,
    errors=gains.errors("weight"),
    source="spec 2.1; Zhang and Sennrich, arXiv:1910.07467",
)
