"""Rotary embedding, gated activation and Hadamard transform: some rows to a program.

Legend: N rows, D columns, R rotary dim, H rows that share a token's angles.
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


@triton_kernel("rope", provides=CLAIMS)
def rope(tuning: Tuning, x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "interleaved") -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return y
    R = x.shape[-1]
    N, meta = x.numel() // R, tile(tuning["rope"], R)
    given, *steps = rows(x)
    launch(
        _rope, (triton.cdiv(N, meta["ROWS"]),), x, given, cos, sin, y, N, R // 2, N // x.shape[0],
        *steps, given.stride(-1), *cos.stride(), *sin.stride(),
        HALVES=layout == "half", INDEX=addresses(tuning), **meta,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["N"])
def _rope(
    x, cos, sin, y, N, half, H,
    inner, outer_step, inner_step, x_col, cos_row, cos_col, sin_row, sin_col,
    HALVES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = COLS // 2
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, PAIRS)
    there = row < N
    token = (row // H).to(INDEX)
    paired = there[:, None] & (pair < half)[None, :]
    c = tl.load(cos + token[:, None] * cos_row + pair[None, :] * cos_col, mask=paired, other=0.0)
    s = tl.load(sin + token[:, None] * sin_row + pair[None, :] * sin_col, mask=paired, other=0.0)
    from_row = x + row_start(row, inner, outer_step, inner_step, INDEX)[:, None]
    to_row = y + (row.to(INDEX) * (2 * half))[:, None]
    if HALVES:
        a = tl.load(from_row + pair[None, :] * x_col, mask=paired, other=0.0).to(tl.float32)
        b = tl.load(from_row + (pair + half)[None, :] * x_col, mask=paired, other=0.0).to(tl.float32)
        tl.store(to_row + pair[None, :], (a * c - b * s).to(y.dtype.element_ty), mask=paired)
        tl.store(to_row + (pair + half)[None, :], (b * c + a * s).to(y.dtype.element_ty), mask=paired)
    else:  # both numbers of a pair in one access
        col = tl.arange(0, COLS)
        here = there[:, None] & (col < 2 * half)[None, :]
        given = tl.load(from_row + col[None, :] * x_col, mask=here, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(given, (ROWS, PAIRS, 2)))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (ROWS, COLS))
        tl.store(to_row + col[None, :], turned.to(y.dtype.element_ty), mask=here)


@triton_kernel("silu_and_mul", provides=CLAIMS)
def silu_and_mul(tuning: Tuning, x: Tensor, *, limit: float | None = None) -> Tensor:
    D = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], D)
    if not y.numel():
        return y
    sizes = tuning["silu_and_mul"]
    N, meta = y.numel() // D, tile(sizes, D, sizes["BLOCK"])
    given, *steps = rows(x)
    launch(
        _silu_and_mul, (triton.cdiv(N, meta["ROWS"]), triton.cdiv(D, meta["COLS"])), x,
        given, y, N, D, 0.0 if limit is None else limit, *steps, given.stride(-1),
        LIMITED=limit is not None, INDEX=addresses(tuning), **meta,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["N"])
def _silu_and_mul(
    x, y, N, D, limit, inner, outer_step, inner_step, x_col,
    LIMITED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    here = (row < N)[:, None] & (col < D)[None, :]
    from_row = x + row_start(row, inner, outer_step, inner_step, INDEX)[:, None]
    gate = tl.load(from_row + col[None, :] * x_col, mask=here, other=0.0).to(tl.float32)
    up = tl.load(from_row + (col + D)[None, :] * x_col, mask=here, other=0.0).to(tl.float32)
    if LIMITED:  # a minimum would lose NaN
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + (row.to(INDEX) * D)[:, None] + col[None, :], value.to(y.dtype.element_ty), mask=here)


@triton_kernel("hadamard", provides=CLAIMS)
def hadamard(tuning: Tuning, x: Tensor, *, scale: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return y
    D = x.shape[-1]
    N, meta = x.numel() // D, tile(tuning["hadamard"], D)
    given, *steps = rows(x)
    launch(
        _hadamard, (triton.cdiv(N, meta["ROWS"]),), x, given, y, N, scale, *steps, given.stride(-1),
        STAGES=D.bit_length() - 1, INDEX=addresses(tuning), **meta,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["N"])
def _hadamard(
    x, y, N, scale, inner, outer_step, inner_step, x_col,
    STAGES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    there = (row < N)[:, None]
    from_row = x + row_start(row, inner, outer_step, inner_step, INDEX)[:, None]
    values = tl.load(from_row + col[None, :] * x_col, mask=there, other=0.0).to(tl.float32)
    for _ in tl.static_range(STAGES):  # each stage is the same: the two halves become neighbours
        a, b = tl.split(tl.trans(tl.reshape(values, (ROWS, 2, COLS // 2)), 0, 2, 1))
        values = tl.reshape(tl.join(a + b, a - b), (ROWS, COLS))
    to_row = y + (row.to(INDEX) * COLS)[:, None]
    tl.store(to_row + col[None, :], (values * scale).to(y.dtype.element_ty), mask=there)
