"""add_rms_norm: the residual stream takes an update, and the next block gets its norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common import gains
from glm5_hal.ops._common.precision import down, up
from glm5_hal.ops._rms_norm import rms_norm, rounded_twice, spoil
from glm5_hal.ops._rms_norm import samples as norm_samples
from glm5_hal.spec import FLOATS, Arg, BitExact, Calibrated, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample, Scalar


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """h = x + residual, and y = rms_norm(h): returns (y, h).

    ``residual_out`` is h rounded once to the activations' dtype: the stream that the next block adds to. ``y`` is the
    norm of that stored h, as it is without fusion; a kernel that norms the fp32 sum before it is stored is as good.
    Neither input is written.
    """
    h = down(up(x) + up(residual), x)
    return rms_norm(h, weight, eps=eps), h


def loosest(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """The loosest honest form: the sum is stored before its norm, the normalised value before the weight."""
    h = down(up(x) + up(residual), x)
    return rounded_twice(h, weight, eps=eps), h


def samples() -> Iterator[Sample]:
    yield from (s for s in norm_samples() if "kv_lora" not in s.id and "q_lora" not in s.id)
    yield Sample("heads", {"T": 3, "H": 4, "D": 80})
    yield Sample("cancelling", {"T": 5, "D": 96, "cancels": True}, tags=frozenset({"edge"}))


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes, D = sample.axes, sample.axes["D"]
    shape = axes.get("shape", tuple(axes[a] for a in "TH" if a in axes))
    # Rows differ in size by powers of two, so that a scale taken from the wrong row shows. The residual stream is
    # larger than what a block adds to it.
    size = (2.0 ** draw.integers(-3, 4, *shape, 1)).to(getattr(torch, dtype))
    x = draw.normal(*shape, D, dtype=dtype) * size
    residual = draw.normal(*shape, D, dtype=dtype, scale=4.0) * size
    if axes.get("cancels"):  # what is left of x and residual is small, so eps shows too
        residual = -x + draw.normal(*shape, D, dtype=dtype, scale=2.0**-8)
    spoil(axes, x, residual)
    weight = (
        gains.wide(draw, D, dtype, axes["wide"])
        if axes.get("wide")
        else draw.uniform(D, dtype=dtype, low=0.25, high=1.0)
    )
    return Inputs({"x": x, "residual": residual, "weight": weight, "eps": axes.get("eps", 1e-5)})


def fuzz(pick: Pick) -> Sample:
    axes = {"T": pick.integer(0, 40), "D": pick.integer(1, 600), "cancels": pick.of((False, True))}
    return Sample("fuzz", {**axes, "H": pick.integer(1, 5)} if pick.of((False, True)) else axes)


def cost(axes: Mapping[str, Any]) -> Cost:
    n = axes["D"] * prod(axes["..."])
    return Cost(flops=5 * n, bytes=axes["itemsize"] * (4 * n + axes["D"]))


SPEC = OpSpec(
    name="add_rms_norm",
    group="elementary",
    reference=add_rms_norm,
    emulate=loosest,
    args=(
        Arg("x", "... D", "F", "what the last block computed, any leading dims"),
        Arg("residual", "... D", "F", "the residual stream"),
        Arg("weight", "D", "W", "gain, in the activations' dtype or float32"),
    ),
    scalars=(Scalar("eps", "added to the mean square: 1e-5 for GLM-5", low=0.0),),
    outs=(
        Out("y", "... D", "F", "normalised sum"),
        Out("residual_out", "... D", "F", "the sum: the residual stream after this block"),
    ),
    dtypes={"F": FLOATS, "W": FLOATS},
    constraints=(gains.as_wide("weight"),),
    rounding="the sum in fp32, rounded once into residual_out; the norm in fp32, of the rounded sum or of the fp32 "
    "one; y rounded once at the end, or also before the multiplication by weight",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    # A sum of two is the same bits whether it is rounded through fp32 or directly: 24 >= 2·11 + 2 bits, 53 >= 2·24 + 2.
    accuracy={"y": Calibrated(depth=("D",)), "residual_out": BitExact()},
    cost=cost,
    fuzz=fuzz,
    errors=gains.errors("weight"),
    source="spec 2, 2.1; vLLM's fused_add_rms_norm norms the rounded sum, FlashInfer's the fp32 one",
)
