"""Norms: one program per row.

Legend: N rows, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.capability import limit

CLAIMS = ("deterministic", "batch_invariant", "graph_safe")

#: A row is one block.
ROW = limit("D", 65536)


@triton_kernel("rms_norm", requires=(ROW,), provides=CLAIMS)
def rms_norm(tuning: Tuning, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(tuning, x, None, weight, y, None, eps)
    return y


@triton_kernel("add_rms_norm", requires=(ROW,), provides=CLAIMS)
def add_rms_norm(tuning: Tuning, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    y, h = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(tuning, x, residual, weight, y, h, eps)
    return y, h


def _launch(
    tuning: Tuning, x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, h: Tensor | None, eps: float
) -> None:
    D = x.shape[-1]
    rows = x.reshape(-1, D) if D else x.new_empty(0, 1)
    other = rows if residual is None else residual.reshape(-1, D)
    launch(
        _rms_norm, (len(rows),), x, rows, other, weight, y, y if h is None else h, D, eps,
        rows.stride(0), rows.stride(1), other.stride(0), other.stride(1), weight.stride(0),
        ADD=residual is not None, BLOCK=triton.next_power_of_2(D), INDEX=addresses(tuning), **tuning["rms_norm"],
    )  # fmt: skip


@triton.jit
def _rms_norm(
    x, residual, weight, y, h, D, eps,
    x_row, x_col, residual_row, residual_col, weight_col,
    ADD: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(INDEX)
    col = tl.arange(0, BLOCK)
    here = col < D
    values = tl.load(x + row * x_row + col * x_col, mask=here, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * residual_row + col * residual_col, mask=here, other=0.0).to(tl.float32)
        rounded = values.to(h.dtype.element_ty)
        tl.store(h + row * D + col, rounded, mask=here)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    gain = tl.load(weight + col * weight_col, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row * D + col, (values * scale * gain).to(y.dtype.element_ty), mask=here)
