"""rope: rotary position embedding, from tables of cosines and sines.

Legend: T tokens, R rotary dim.
"""

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

LAYOUTS = ("interleaved", "half")


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "interleaved") -> Tensor:
    """Turns pair i of token t by its angle: (a, b) → (a·cos − b·sin, b·cos + a·sin), with cos[t, i] and sin[t, i].

    ``layout`` says where a pair lies, in x and in y alike: "interleaved" (x[2i], x[2i+1]), "half" (x[i], x[i + R/2]).
    GLM-5 uses interleaved for the main attention and the indexer; DeepSeek-V3.2's indexer uses half. The output is not
    reordered, so it may go into a cache that other engines read; transformers de-interleaves here.

    The tables serve every head of a token and are used as they are: whoever builds them owns the arithmetic of the
    angles, and may fold a factor in. Build them in float64 (``glm5_hal.rope_tables``): fp32 angles are off by up to
    0.01 at position 200,000. ``x`` holds the rotary dims only: pass a slice of a wider head.
    """
    per_token = (x.shape[0], *[1] * (x.dim() - 2), cos.shape[1])
    c, s = up(cos).reshape(per_token), up(sin).reshape(per_token)
    wide = up(x)
    if layout == "interleaved":
        a, b = wide[..., 0::2], wide[..., 1::2]
        return down(torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2), x)
    a, b = wide.chunk(2, -1)
    return down(torch.cat((a * c - b * s, b * c + a * s), -1), x)


def unit_tables(draw: Draw, tokens: int, half: int) -> tuple[Tensor, Tensor]:
    """fp32 tables of angles all round the circle, without a library's cosine: the same bits on every host."""
    t = draw.uniform(tokens, half, dtype="float64", low=-4.0, high=4.0)  # the tangent of half the angle
    return ((1 - t * t) / (1 + t * t)).float(), (2 * t / (1 + t * t)).float()


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    for layout in LAYOUTS:
        yield Sample(f"heads-{layout}", {"shape": (5, 3, 24), "layout": layout})
        yield Sample(f"shared_key-{layout}", {"shape": (7, 64), "layout": layout})
        yield Sample(f"integers-{layout}", {"shape": (5, 3, 16), "layout": layout}, fill="exact")
        yield Sample(f"one_pair-{layout}", {"shape": (3, 1, 2), "layout": layout}, tags=edge)
        yield Sample(f"no_tokens-{layout}", {"shape": (0, 3, 16), "layout": layout}, tags=edge)
        yield Sample(f"many_heads-{layout}", {"shape": (2, 72, 72), "layout": layout}, dtypes=("bfloat16",))
    yield Sample(
        "float64_tables", {"shape": (3, 2, 16), "layout": "interleaved", "tables": "float64"}, fill="exact",
        dtypes=("bfloat16",),
    )  # fmt: skip
    yield Sample("no_heads", {"shape": (4, 0, 16), "layout": "interleaved"}, tags=edge)
    yield Sample("grouped_heads", {"shape": (4, 2, 3, 16), "layout": "interleaved"}, tags=edge)
    standard: dict[str, Any] = {"level": "standard", "tags": glm5, "dtypes": ("bfloat16", "float32")}
    yield Sample("glm5-q", {"shape": (128, 64, 64), "layout": "interleaved"}, **standard)
    yield Sample("glm5-k", {"shape": (4096, 64), "layout": "interleaved"}, **standard)
    yield Sample("glm5-indexer-q", {"shape": (128, 32, 64), "layout": "interleaved"}, **standard)
    yield Sample(
        "dsv32-indexer-q", {"shape": (128, 64, 64), "layout": "half"}, "standard", dtypes=("bfloat16", "float32")
    )


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    shape, exact = sample.axes["shape"], sample.fill == "exact"
    T, half = shape[0], shape[-1] // 2
    if exact:  # tables of more digits than the narrow dtypes hold; products and sums are exact in fp32
        x = _odd(draw, *shape, below=128).to(getattr(torch, dtype))
        cos, sin = (_odd(draw, T, half, below=1024) / 1024 for _ in range(2))
    else:
        x = draw.normal(*shape, dtype=dtype)
        cos, sin = unit_tables(draw, T, half)
    cos, sin = (table.to(getattr(torch, sample.axes.get("tables", "float32"))) for table in (cos, sin))
    return Inputs({"x": x, "cos": cos, "sin": sin, "layout": sample.axes["layout"]})


def _odd(draw: Draw, *shape: int, below: int) -> Tensor:
    """Odd numbers, so never zero: a product of zero would have a sign."""
    return 2.0 * draw.integers(-below // 2, below // 2, *shape) + 1.0


def fuzz(pick: Pick) -> Sample:
    heads = pick.of(((), (pick.integer(0, 5),), (pick.integer(1, 3), pick.integer(1, 3))))
    shape = (pick.integer(0, 70), *heads, 2 * pick.integer(1, 70))
    return Sample("fuzz", {"shape": shape, "layout": pick.of(LAYOUTS)}, fill=pick.of(("normal", "exact")))


def cost(axes: Mapping[str, Any]) -> Cost:
    n = axes["T"] * axes["R"] * prod(axes["..."])
    return Cost(flops=3 * n, bytes=axes["itemsize"] * 2 * n + 4 * axes["T"] * axes["R"])


def _odd_width(args: dict[str, Any]) -> dict[str, Any]:
    half = args["cos"].shape[1] - 1
    return {**args, "x": args["x"][..., :-1], "cos": args["cos"][:, :half], "sin": args["sin"][:, :half]}


SPEC = OpSpec(
    name="rope",
    group="elementary",
    reference=rope,
    args=(
        Arg("x", "T ... R", "F", "the rotary dims of queries or keys, with or without a heads dim"),
        Arg("cos", "T R//2", "A", "cosine of each token's angles"),
        Arg("sin", "T R//2", "A", "sine of each token's angles"),
    ),
    scalars=(Scalar("layout", "where the two numbers of a pair lie, in x and in y", choices=LAYOUTS),),
    outs=(Out("y", "T ... R", "F", "x, turned, in x's own layout"),),
    dtypes={"F": FLOATS, "A": ("float32", "float64")},
    constraints=(
        Constraint("R is even", lambda known: bool(known["R"] % 2 == 0), "pass the rotary dims only, an even number"),
    ),
    rounding="computed in fp32, tables included; rounded once at the end",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"y": Calibrated()},
    cost=cost,
    fuzz=fuzz,
    errors=(
        BadInput("odd_rotary_dim", "SHAPE", _odd_width),
        BadInput("unknown_layout", "SCALAR", lambda args: {**args, "layout": "neox"}),
    ),
    source="spec 2.2, 4.2, 14.1; Su et al., arXiv:2104.09864",
)
