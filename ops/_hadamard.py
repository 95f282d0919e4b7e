"""hadamard: the Walsh-Hadamard transform of the last dim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common.precision import down, up
from glm5_hal.spec import (
    FLOATS,
    Arg,
    BadInput,
    Calibrated,
    Constraint,
    Cost,
    Draw,
    Inputs,
    OpSpec,
    Out,
    Pick,
    Sample,
    Scalar,
)


def hadamard(x: Tensor, *, scale: float) -> Tensor:
    """y = scale · H_D x, with Sylvester's H: H_1 = [1], H_2D = [[H_D, H_D], [H_D, −H_D]]. D is a power of two.

    H_D[i, j] = (−1)^(number of ones that i and j share in binary). It is symmetric and H_D H_D = D·I, so with
    scale = D^-0.5 the transform is its own inverse and keeps inner products: the indexer may apply it to queries and
    keys before they are quantised (both, or neither) without changing a score.
    """
    D, y, half = x.shape[-1], up(x), 1
    while half < D:
        a, b = y.reshape(*x.shape[:-1], D // (2 * half), 2, half).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return down(y * scale, x)


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    yield Sample("rows", {"shape": (5, 3, 64), "scale": 0.3})
    yield Sample("pair", {"shape": (3, 2), "scale": 0.7}, tags=edge)
    yield Sample("single", {"shape": (3, 1), "scale": 0.7}, tags=edge)
    yield Sample("no_rows", {"shape": (0, 32), "scale": 0.7}, tags=edge)
    yield Sample("integers", {"shape": (7, 128), "scale": 0.125}, fill="exact")
    for D in (4, 8, 16, 32, 256, 512, 1024, 2048, 4096):
        yield Sample(f"rows-{D}", {"shape": (3, D), "scale": 0.3}, dtypes=("bfloat16",))
    # Sums beyond float16's range, of which the scale brings the result back.
    yield Sample("large_sums", {"shape": (3, 128), "scale": 2.0**-7, "shift": 600.0}, tags=edge, dtypes=("float16",))
    standard: dict[str, Any] = {"level": "standard", "dtypes": ("bfloat16", "float32")}
    for name, tokens, heads in (("glm5-indexer-q", 256, 32), ("dsv32-indexer-q", 128, 64)):
        tags = glm5 if name.startswith("glm5") else frozenset()
        yield Sample(name, {"shape": (tokens, heads, 128), "scale": 128**-0.5}, tags=tags, **standard)
    yield Sample("wide", {"shape": (64, 4096), "scale": 2.0**-6}, **standard)


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    shape = sample.axes["shape"]
    if sample.fill == "exact":
        # as many digits as bfloat16 holds: a sum that is rounded to storage after every stage shows
        return Inputs({"x": draw.small(*shape, dtype=dtype, bound=127), "scale": sample.axes["scale"]})
    x = draw.normal(*shape, dtype=dtype)
    x[..., :1] *= 16  # an outlier, which the transform spreads
    return Inputs({"x": x + sample.axes.get("shift", 0.0), "scale": sample.axes["scale"]})


def fuzz(pick: Pick) -> Sample:
    shape = (pick.integer(0, 40), *pick.of(((), (pick.integer(1, 4),))), 2 ** pick.integer(0, 9))
    return Sample("fuzz", {"shape": shape, "scale": pick.of((0.125, 0.3))})


def cost(axes: Mapping[str, Any]) -> Cost:
    n = axes["D"] * prod(axes["..."])
    return Cost(flops=n * axes["D"].bit_length(), bytes=axes["itemsize"] * 2 * n)


SPEC = OpSpec(
    name="hadamard",
    group="elementary",
    reference=hadamard,
    args=(Arg("x", "... D", "F", "vectors, any leading dims"),),
    scalars=(Scalar("scale", "factor on the result, D^-0.5 for an orthogonal transform"),),
    outs=(Out("y", "... D", "F", "transformed vectors"),),
    dtypes={"F": FLOATS},
    constraints=(
        Constraint(
            "D is a power of two",
            lambda known: known["D"] > 0 and known["D"] & (known["D"] - 1) == 0,
            "pad the last dim with zeros to the next power of two",
        ),
    ),
    rounding="sums and scale in fp32; rounded once at the end",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"y": Calibrated(depth=("D",))},
    cost=cost,
    fuzz=fuzz,
    errors=(BadInput("not_a_power_of_two", "SHAPE", lambda args: {**args, "x": args["x"][..., :-1]}),),
    source="spec 4.5",
)
