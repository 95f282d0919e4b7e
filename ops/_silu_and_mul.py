"""silu_and_mul: the gated activation of every MLP and expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common.precision import down, stored, up
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


def silu_and_mul(x: Tensor, *, limit: float | None = None) -> Tensor:
    """y = silu(gate) · up, with x = gate ‖ up along the last dim and silu(g) = g / (1 + e^−g).

    With ``limit`` (the clamped SwiGLU of GLM-5.3-Flash, swiglu_limit 10) gate is first cut to at most ``limit``, and up
    to [−limit, limit]; gate has no lower bound. NaN stays NaN through the clamp. GLM-5 has no limit.
    """
    gate, other = _halves(x, limit)
    return down(gate * torch.sigmoid(gate) * other, x)


def rounded_twice(x: Tensor, *, limit: float | None = None) -> Tensor:
    """The loosest honest form: silu(gate) is stored before it is multiplied by up."""
    gate, other = _halves(x, limit)
    return down(stored(gate * torch.sigmoid(gate), x) * other, x)


def _halves(x: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, other = up(x).chunk(2, -1)
    return (gate, other) if limit is None else (gate.clamp(max=limit), other.clamp(-limit, limit))


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    yield Sample("tokens", {"shape": (5, 192)})
    yield Sample("uneven", {"shape": (3, 2, 70)}, tags=edge)
    yield Sample("one", {"shape": (1, 2)}, tags=edge)
    yield Sample("no_tokens", {"shape": (0, 64)}, tags=edge)
    yield Sample("clamped", {"shape": (5, 192), "limit": 1.5})
    yield Sample("clamped-uneven", {"shape": (5, 192), "limit": 1.0037})  # of more digits than the narrow dtypes hold
    yield Sample("clamped_infinities", {"shape": (5, 192), "limit": 3.0, "non_finite": True}, tags=edge)
    yield Sample("saturated", {"shape": (5, 192)}, fill="exact")
    yield Sample("saturated-clamped", {"shape": (5, 192), "limit": 64.0}, fill="exact")
    yield Sample("wide", {"shape": (2, 26000)}, dtypes=("bfloat16",))
    yield Sample("vector", {"shape": (70,)}, tags=edge, dtypes=("bfloat16",))
    standard: dict[str, Any] = {"level": "standard", "dtypes": ("bfloat16", "float32")}
    yield Sample("glm5-expert", {"shape": (256, 4096)}, tags=glm5, **standard)
    yield Sample("glm5-dense", {"shape": (32, 24576)}, tags=glm5, **standard)
    yield Sample("glm53-expert", {"shape": (64, 4096), "limit": 10.0}, tags=glm5, **standard)


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    shape, exact = sample.axes["shape"], sample.fill == "exact"
    x = draw.normal(*shape, dtype=dtype, scale=2.0)
    if exact:
        # Where the sigmoid is 0 or 1 to all digits: 32 k, or far below zero.
        gate, other = draw.small(*shape, dtype=dtype, bound=4).chunk(2, -1)
        x = torch.cat([torch.where(gate < 0, gate * 256, gate * 32), other], -1)
    elif not sample.axes.get("limit") and shape[-1] > 2:
        x[..., 0::3] *= 4  # gates far to either side too, unless one such is all there is of a row
    if sample.axes.get("non_finite"):
        kinds = draw.integers(0, 24, *shape)
        gates = kinds[..., : shape[-1] // 2]
        gates[gates == 1] = 2  # silu(−inf) is 0 in the limit and NaN as computed: not tested
        for code, value in enumerate((torch.inf, -torch.inf, torch.nan)):
            x[kinds == code] = value
    return Inputs({"x": x, "limit": sample.axes.get("limit")})


def amplification(args: Mapping[str, Any]) -> Tensor:
    """Of each row: the sigmoid is right to fp32's roundoff as a number between 0 and 1, not relative to itself, so a
    gate far below zero leaves its product with less."""
    gate, other = _halves(args["x"].double(), args["limit"])
    most, left = ((v * other).nan_to_num(0, 0, 0).norm(dim=-1) for v in (gate, gate * torch.sigmoid(gate)))
    return torch.where(left > 0, most / left, 1.0)


def fuzz(pick: Pick) -> Sample:
    shape = (pick.integer(0, 40), *pick.of(((), (pick.integer(1, 4),))), 2 * pick.integer(1, 300))
    return Sample("fuzz", {"shape": shape, **pick.of(({}, {"limit": 1.5}))})


def cost(axes: Mapping[str, Any]) -> Cost:
    n = axes["D2"] // 2 * prod(axes["..."])
    return Cost(flops=5 * n, bytes=axes["itemsize"] * 3 * n)


LIMIT = Constraint(
    "limit is above 0",
    lambda known: known["limit"] is None or bool(known["limit"] > 0),
    "pass the model's swiglu_limit, or None for no clamp",
    code="SCALAR",
)

SPEC = OpSpec(
    name="silu_and_mul",
    group="elementary",
    reference=silu_and_mul,
    emulate=rounded_twice,
    args=(Arg("x", "... D2", "F", "gate, then up, along the last dim; any leading dims"),),
    scalars=(Scalar("limit", "clamp of gate from above and of up on both sides, above 0; None for no clamp"),),
    outs=(Out("y", "... D2//2", "F", "gated activations"),),
    dtypes={"F": FLOATS},
    constraints=(
        Constraint("D2 is even", lambda known: bool(known["D2"] % 2 == 0), "concatenate gate and up of one width"),
        LIMIT,
    ),
    rounding="computed in fp32; rounded once at the end, or also before the multiplication by up",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"y": Calibrated(amplify=amplification)},
    cost=cost,
    fuzz=fuzz,
    errors=(
        BadInput("odd_width", "SHAPE", lambda args: {**args, "x": args["x"][..., :-1]}),
        BadInput("limit_zero", "SCALAR", lambda args: {**args, "limit": 0.0}),
        BadInput("limit_negative", "SCALAR", lambda args: {**args, "limit": -1.0}),
    ),
    source="spec 1.3, 5.2; Shazeer, arXiv:2002.05202",
)
