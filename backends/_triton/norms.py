"""Norms: some short rows to a program, or one; a very long row chunk by chunk.

Legend: N rows, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.strided import row_start, rows, tile
from glm5_hal.backends._triton.tuning import Tuning

CLAIMS = ("deterministic", "batch_invariant", "graph_safe")


@triton_kernel("rms_norm", provides=CLAIMS)
def rms_norm(tuning: Tuning, x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(tuning, x, None, weight, y, None, eps)
    return y


@triton_kernel("add_rms_norm", provides=CLAIMS)
def add_rms_norm(tuning: Tuning, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    y, h = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(tuning, x, residual, weight, y, h, eps)
    return y, h


def _launch(
    tuning: Tuning, x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, h: Tensor | None, eps: float
) -> None:
    if not x.numel():
        return
    D = x.shape[-1]
    sizes = dict(tuning["rms_norm"])
    meta = tile(sizes, D, sizes.pop("LONGEST"))
    N = x.numel() // D
    given, *steps = found = rows(x)
    other, *other_steps = found if residual is None else rows(residual)
    launch(
        _rms_norm, (triton.cdiv(N, meta["ROWS"]),), x, given, other, weight, y, y if h is None else h, N, D, eps,
        *steps, given.stride(-1), *other_steps, other.stride(-1), weight.stride(0),
        ADD=residual is not None, WHOLE=meta["COLS"] >= D, INDEX=addresses(tuning), **meta,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _rms_norm(
    x, residual, weight, y, h, N, D, eps,
    x_inner, x_outer_step, x_inner_step, x_col,
    residual_inner, residual_outer_step, residual_inner_step, residual_col, weight_col,
    ADD: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < N)[:, None]
    x += row_start(row, x_inner, x_outer_step, x_inner_step, INDEX)[:, None]
    residual += row_start(row, residual_inner, residual_outer_step, residual_inner_step, INDEX)[:, None]
    to_row = (row.to(INDEX) * D)[:, None]
    col = tl.arange(0, COLS)
    values = _sum(x, residual, h, to_row, there, col, D, x_col, residual_col, ADD, ADD)
    squares = tl.sum(values * values, 1)
    if not WHOLE:
        for start in range(COLS, D, COLS):
            more = _sum(x, residual, h, to_row, there, start + col, D, x_col, residual_col, ADD, ADD)
            squares += tl.sum(more * more, 1)
    scale = tl.rsqrt(squares / D + eps)[:, None]
    if WHOLE:
        _store(y, to_row, values * scale, weight, weight_col, there, col, D)
    else:  # x and residual anew: what another thread of the program stored in h may not be there yet
        for start in range(0, D, COLS):
            again = _sum(x, residual, h, to_row, there, start + col, D, x_col, residual_col, ADD, False)
            _store(y, to_row, again * scale, weight, weight_col, there, start + col, D)


@triton.jit
def _sum(x, residual, h, to_row, there, col, D, x_col, residual_col, ADD: tl.constexpr, KEEP: tl.constexpr):
    """What is normed: x, or x + residual as it is stored in h, where it is kept if asked."""
    here = there & (col < D)[None, :]
    values = tl.load(x + col[None, :] * x_col, mask=here, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + col[None, :] * residual_col, mask=here, other=0.0).to(tl.float32)
        rounded = values.to(h.dtype.element_ty)
        values = rounded.to(tl.float32)
        if KEEP:
            tl.store(h + to_row + col[None, :], rounded, mask=here)
    return values


@triton.jit
def _store(y, to_row, values, weight, weight_col, there, col, D):
    gain = tl.load(weight + col * weight_col, mask=col < D, other=0.0).to(tl.float32)
    here = there & (col < D)[None, :]
    tl.store(y + to_row + col[None, :], (values * gain[None, :]).to(y.dtype.element_ty), mask=here)
