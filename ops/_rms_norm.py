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
    edge, narrow = frozenset({"edge"}), ("bfloat16", "float16")
    yield Sample("wide", {"T": 2, "D": 7168}, dtypes=("bfloat16",))
    yield Sample("many_rows", {"T": 260, "D": 4}, dtypes=("bfloat16",))
    yield Sample("leading_dims", {"shape": (2, 3), "D": 96}, dtypes=("bfloat16",))
    yield Sample("vector", {"shape": (), "D": 96}, tags=edge, dtypes=("bfloat16",))
    yield Sample("small_rows", {"T": 4, "D": 96, "small": True}, tags=edge)  # eps counts
    yield Sample("another_eps", {"T": 4, "D": 96, "small": True, "eps": 3e-3}, tags=edge)
    yield Sample("large_values", {"T": 3, "D": 96, "large": True}, tags=edge, dtypes=("float16",))
    yield Sample("float32_weight", {"T": 64, "D": 24, "wide": 1.0}, dtypes=narrow)
    tiny = {"T": 64, "D": 24, "wide": 2.0**-22}  # float16 does not hold such gains
    yield Sample("tiny_float32_weight", tiny, tags=edge, dtypes=("bfloat16",))
    for name, tokens, dim in (("hidden", 64, 6144), ("q_lora", 64, 2048), ("kv_lora", 256, 512)):
        yield Sample(f"glm5-{name}", {"T": tokens, "D": dim}, "standard", tags=frozenset({"glm5"}))


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes, D = sample.axes, sample.axes["D"]
    shape = axes.get("shape", (axes.get("T"),))
    # Rows differ in size by powers of two, so that a scale taken from the wrong row shows.
    x = draw.normal(*shape, D, dtype=dtype) * (2.0 ** draw.integers(-3, 4, *shape, 1)).to(getattr(torch, dtype))
    spoil(axes, x)
    gain = (
        gains.wide(draw, D, dtype, axes["wide"])
        if axes.get("wide")
        else draw.uniform(D, dtype=dtype, low=0.25, high=1.0)
    )
    return Inputs({"x": x, "weight": gain, "eps": axes.get("eps", 1e-5)})


def spoil(axes: Mapping[str, Any], x: Tensor, residual: Tensor | None = None) -> None:
    """Rows of which the size is nothing beside eps, or an element of which float16 cannot hold the square."""
    for part in (x,) if residual is None else (x, residual):
        if axes.get("small"):
            part[0] = 0.0
            part[1:] *= 2.0**-9
        if axes.get("large"):
            part[:, 0] = 300.0 if part is x else 0.0


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
