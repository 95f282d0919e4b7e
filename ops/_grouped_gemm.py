"""grouped_gemm: every expert's rows times that expert's weight.

Legend: M rows, K input features, N output features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from glm5_hal.ops._common import checks
from glm5_hal.ops._common.draws import cancelling, mirrored, weight_scale
from glm5_hal.ops._common.paging import offsets
from glm5_hal.ops._common.precision import down, up
from glm5_hal.ops._common.prolog import WEIGHT_FORMAT
from glm5_hal.plan import host_list
from glm5_hal.spec import FLOATS, Arg, BadInput, Calibrated, Cost, Draw, Inputs, OpSpec, Out, Pick, Sample


def grouped_gemm(x: Tensor, weight: Tensor, expert_offsets: Tensor, *, weight_format: str = "plain") -> Tensor:
    """y[m] = weight[e] x[m] for the rows expert_offsets[e] <= m < expert_offsets[e + 1] of every expert e.

    An expert may have no rows. Rows from expert_offsets[−1] on are zero, and their x is not read: x may be longer than
    the rows in use, so that its shape does not depend on how tokens were routed.

    ``weight_format`` names a prepared form of the weight (`glm5_hal.prepare`): the same shape and dtype over other
    bytes. "plain" is row-major, [out, in] for each expert; a kernel refuses a format that it does not declare.
    """
    ends = host_list(expert_offsets)
    y = up(x).new_zeros(x.shape[0], weight.shape[1])
    for e, (start, end) in enumerate(pairwise(ends)):
        if start < end:
            y[start:end] = up(x[start:end]) @ up(weight[e]).T
    return down(y, x)


def check_values(args: Mapping[str, Any]) -> None:
    name, ends, rows = "grouped_gemm", args["expert_offsets"], args["x"].shape[0]
    checks.in_range(name, "expert_offsets", ends, 0, rows + 1, f"x has {rows} rows")
    checks.offsets(name, "expert_offsets", ends, int(ends[-1]), "rows in use")


#: A prime, so that no two rows of tiled weights are alike.
PERIOD = 1_000_003


def expert_weights(draw: Draw, *shape: int, dtype: str) -> Tensor:
    """Weights [E, out, in], experts of different size, that keep the size of what goes through them within a factor of
    eight. Tiled from one draw: fresh numbers for GLM-5's experts would take gigabytes."""
    total = prod(shape)
    one = min(total, PERIOD)
    base = draw.normal(one, dtype=dtype, scale=weight_scale(shape[-1]))
    tiled = base.repeat(-(-total // one))[:total].view(shape) if total else base.view(shape)
    return tiled.mul_((2.0 ** (torch.arange(shape[0]) % 3)).to(base.dtype).view(-1, 1, 1))


def samples() -> Iterator[Sample]:
    edge, glm5 = frozenset({"edge"}), frozenset({"glm5"})
    tiny = {"N": 24, "K": 40}
    yield Sample(
        "ragged", {**tiny, "rows": (3, 0, 13, 1, 0)}
    )  # few and many rows: kernels may multiply these otherwise
    yield Sample("unused_rows", {**tiny, "rows": (0, 4, 2), "tail": 5})
    yield Sample("mostly_idle", {**tiny, "rows": (0, 0, 0, 0, 0, 2, 0, 0), "tail": 6}, tags=edge)
    yield Sample("one_expert", {**tiny, "rows": (9,)}, tags=edge)
    yield Sample("no_experts", {**tiny, "rows": (), "tail": 5}, tags=edge | {"empty"})
    yield Sample("no_rows", {**tiny, "rows": (0, 0, 0)}, tags=edge)
    yield Sample("uneven", {"N": 17, "K": 33, "rows": (1, 2, 5)}, tags=edge)
    yield Sample("one", {"N": 1, "K": 1, "rows": (1, 1)}, tags=edge)
    yield Sample("integers", {"N": 24, "K": 64, "rows": (3, 0, 7, 1), "tail": 3}, fill="exact")
    # Past the tiles of rows, columns and features that kernels are made of.
    yield Sample("tiles", {"N": 100, "K": 160, "rows": (3, 130)}, dtypes=("bfloat16", "float32"))
    yield Sample("many_experts", {"N": 9, "K": 16, "rows": (1,) * 40}, tags=edge, dtypes=("bfloat16",))
    yield Sample("long_sums", {"N": 24, "K": 2048, "rows": (3, 5)}, fill="exact", dtypes=("bfloat16",))
    rows = (8, 3, 0, 14, 21, 1, 5, 12)  # 64 tokens that came to one rank of EP32
    for name, N, K in (("gate_up", 4096, 6144), ("down", 6144, 2048)):
        yield Sample(f"glm5-{name}", {"N": N, "K": K, "rows": rows}, "standard", tags=glm5, dtypes=("bfloat16",))
    yield Sample(
        "glm5-down-two", {"N": 6144, "K": 2048, "rows": (5, 3), "tail": 8}, "standard", tags=glm5, dtypes=("float32",)
    )


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes, exact = sample.axes, sample.fill == "exact"
    N, K, rows = axes["N"], axes["K"], axes["rows"]
    used = sum(rows)
    M = used + axes.get("tail", 0)
    if exact:
        x, weight = mirrored(draw, M, K, dtype), cancelling(draw, len(rows) * N, K, dtype).view(len(rows), N, K)
    else:
        x, weight = draw.normal(M, K, dtype=dtype), expert_weights(draw, len(rows), N, K, dtype=dtype)
    unread = (torch.arange(M) >= used)[:, None].expand(M, K)
    args = {
        "x": x.masked_fill(unread, 77.0),
        "weight": weight,
        "expert_offsets": offsets(rows),
        "weight_format": "plain",
    }
    return Inputs(args, {"x": unread})


def fuzz(pick: Pick) -> Sample:
    rows = tuple(pick.integer(0, 20) for _ in range(pick.integer(1, 9)))
    axes = {"N": pick.integer(1, 80), "K": pick.integer(1, 130), "rows": rows, "tail": pick.integer(0, 9)}
    return Sample("fuzz", axes, tags=frozenset({"empty"}))


def cost(axes: Mapping[str, Any]) -> Cost:
    M, N, K = axes["M"], axes["N"], axes["K"]
    touched = min(axes["E"], M)
    return Cost(flops=2 * M * N * K, bytes=axes["itemsize"] * (M * K + touched * N * K + M * N))


def _with_offset(at: int, value: Callable[[int], int]) -> Any:
    def spoil(args: dict[str, Any]) -> dict[str, Any]:
        args["expert_offsets"] = args["expert_offsets"].clone()
        args["expert_offsets"][at] = value(args["x"].shape[0])
        return args

    return spoil


SPEC = OpSpec(
    name="grouped_gemm",
    group="moe",
    reference=grouped_gemm,
    args=(
        Arg("x", "M K", "F", "rows, expert by expert"),
        Arg("weight", "E N K", "F", "each expert's weight, [out, in]"),
        Arg("expert_offsets", "E+1", "int32", "first row of each expert, and the number of rows in use"),
    ),
    scalars=(WEIGHT_FORMAT,),
    outs=(Out("y", "M N", "F", "products; zero beyond the rows in use"),),
    dtypes={"F": FLOATS},
    rounding="products and sums in fp32; rounded once at the end",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"y": Calibrated(depth=("K",))},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        BadInput("offsets_past_the_end", "VALUE", _with_offset(-1, lambda rows: rows + 1)),
        BadInput("offsets_fall", "VALUE", _with_offset(2, lambda rows: 1)),
        BadInput("offsets_start_late", "VALUE", _with_offset(0, lambda rows: 1)),
        BadInput("weight_format_not_a_name", "TYPE", lambda args: {**args, "weight_format": 3}),
    ),
    source="spec 5.2, 11, 12",
)
