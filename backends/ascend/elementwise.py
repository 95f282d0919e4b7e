"""rope and silu_and_mul by npu_rotary_mul and npu_swiglu.

Their conventions, and what is done about them:

- a table has a column for every rotary dim, so each of ours stands twice: side by side where pairs are interleaved, one
  half after the other where they are half a head apart.
- a table's values are within [-1, 1]. One that has a factor folded in is divided by a power of two.
- torch_npu converts the tables to the dtype of x, which would round them: so x is converted, and the result rounded
  once. npu_interleave_rope, which wants tables in bfloat16 and stores its result in the other layout, is not used.
- npu_swiglu has no limit: both halves are clamped before, in float32.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends.ascend.needs import A2_A3, floats, has
from glm5_hal.capability import dtype, when
from glm5_hal.signature import Signature

#: What npu_rotary_mul's dims stay below.
MOST_HEADS, MOST_DIMS = 1000, 896


def _fits(call: Signature) -> bool:
    x = call.tensors["x"]
    return x is None or (prod(x.shape[1:-1]) < MOST_HEADS and x.shape[-1] < MOST_DIMS)


@kernel(
    "rope",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_rotary_mul"),
        *floats("x"),
        dtype("cos", "float32"),
        when(
            _fits,
            f"less than {MOST_HEADS} heads and less than {MOST_DIMS} rotary dims",
            "split the heads, or use another kernel",
            reads=(("x", "shape"),),
        ),
    ),
    provides=("graph_safe",),
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "interleaved") -> Tensor:
    if x.numel() == 0:
        return x.new_empty(x.shape)
    cos, sin, factor = (columns(table, layout)[:, None] for table in _within_one(cos, sin))
    rows = x.reshape(len(x), -1, x.shape[-1]) * factor  # [T, N, R], in float32
    mode = "interleave" if layout == "interleaved" else "half"
    turned: Tensor = torch.ops.npu.npu_rotary_mul(rows, cos, sin, mode)
    return turned.to(x.dtype).view(x.shape)


def _within_one(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tables within [-1, 1], and what a pair is multiplied by instead: a power of two, so that nothing is rounded; NaN
    where a table is not finite."""
    size = torch.maximum(cos.abs(), sin.abs())
    factor = torch.where(size <= 1, 1.0, torch.exp2(size.log2().ceil()))
    finite = size.isfinite()
    cos, sin = (torch.where(finite, table / factor, 0.0) for table in (cos, sin))
    return cos, sin, torch.where(finite, factor, torch.nan)


def columns(table: Tensor, layout: str) -> Tensor:
    """[T, R/2] as the vendor's ops have tables: [T, R], contiguous."""
    return table.repeat_interleave(2, -1) if layout == "interleaved" else torch.cat([table, table], -1)


@kernel(
    "silu_and_mul",
    "aclnn",
    requires=(A2_A3, *has("npu_swiglu"), *floats("x")),
    provides=("graph_safe",),
)
def silu_and_mul(x: Tensor, *, limit: float | None = None) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    return swiglu(x.contiguous(), limit).view(*x.shape[:-1], x.shape[-1] // 2)


def swiglu(rows: Tensor, limit: float | None) -> Tensor:
    """Of contiguous rows, not none of them."""
    if limit is None:
        return torch.ops.npu.npu_swiglu(rows, -1)  # type: ignore[no-any-return]
    gate, up = rows.float().chunk(2, -1)  # a narrower dtype would round the limit
    clamped = torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)], -1)
    return torch.ops.npu.npu_swiglu(clamped, -1).to(rows.dtype)  # type: ignore[no-any-return]
