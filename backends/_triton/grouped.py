"""The experts' products: one tile of one expert's rows to a program.

Legend: M rows, sorted by expert, N output features, C input features, E experts; T tokens, K experts per token,
D hidden size, I intermediate size. A slot is one (token, k), token by token.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.combining import combined
from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.permuting import sorted_slots
from glm5_hal.backends._triton.ragged import block_of
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.signature import Signature

#: Tiles are the same for every batch: so are the order of each sum, and its bits.
CLAIMS = ("deterministic", "batch_invariant", "graph_safe")


@triton_kernel("grouped_gemm", provides=CLAIMS)
def grouped_gemm(
    tuning: Tuning, x: Tensor, weight: Tensor, expert_offsets: Tensor, *, weight_format: str = "plain"
) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    _product(tuning, x, weight, expert_offsets, y, every_row=True)
    return y


def _expanded(call: Signature) -> int:
    """Elements of all chosen experts' rows."""
    T, K, D, I = (call.axes[name] for name in "TKDI")  # noqa: E741 - the letters of the legend
    return T * K * max(D, I)


@triton_kernel("moe_experts", provides=CLAIMS, scratch=_expanded)
def moe_experts(
    tuning: Tuning,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared: Tensor | None = None,
    *,
    limit: float | None = None,
    weight_format: str = "plain",
) -> Tensor:
    (T, K), (E, D, I) = topk_ids.shape, w_down.shape  # noqa: E741 - the letters of the legend
    M = T * K
    offsets, inverse, slots = sorted_slots(tuning, topk_ids, E)
    hidden, result = x.new_empty(M, I), x.new_empty(M, D)
    grid, meta = _tiles(tuning, "moe_experts", M, I, D, E, x)
    launch(
        _gated, grid, x, x, w_gate_up, offsets, slots, hidden, M, I, D, E, K, 0.0 if limit is None else float(limit),
        *x.stride(), *w_gate_up.stride(), LIMITED=limit is not None, **meta,
    )  # fmt: skip
    _product(tuning, hidden, w_down, offsets, result, every_row=False)
    return combined(tuning, result, topk_weights, inverse, shared)


def _product(tuning: Tuning, x: Tensor, weight: Tensor, offsets: Tensor, y: Tensor, *, every_row: bool) -> None:
    """Rows beyond the last are made zero where ``every_row`` of y counts, else left as they are."""
    M, (E, N, C) = x.shape[0], weight.shape
    grid, meta = _tiles(tuning, "grouped_gemm", M, N, C, E, x)
    launch(
        _multiply, grid, x, x, weight, offsets.contiguous(), y, M, N, C, E, *x.stride(), *weight.stride(),
        EVERY_ROW=every_row, **meta,
    )  # fmt: skip


def _tiles(tuning: Tuning, op: str, M: int, N: int, C: int, E: int, x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the meta-parameters: BLOCK_N and BLOCK_K of the tuning are for two bytes, and hold half as
    many of four. No block is wider than what it is to hold.

    Each expert's last block may be partly filled, as may be that of the rows beyond: there are at most
    ceil(M / BLOCK_M) + min(E, M - 1) blocks of rows, wherever the offsets lie.
    """
    sizes = tuning.products(op, x.itemsize)
    for name, width in (("BLOCK_N", N), ("BLOCK_K", C)):
        sizes[name] = max(16, min(sizes[name] * 2 // x.itemsize, triton.next_power_of_2(width)))
    row_blocks = triton.cdiv(M, sizes["BLOCK_M"]) + min(E, max(M - 1, 0))
    grid = row_blocks * triton.cdiv(N, sizes["BLOCK_N"])
    return (grid,), {"BLOCK_E": triton.next_power_of_2(max(E, 1)), "INDEX": addresses(tuning), **sizes}


@triton.jit
def _tile_of(
    M, N, offsets, E, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """This program's (expert, rows [BLOCK_M], end of the expert's rows, columns [BLOCK_N]).

    The expert is E for rows that no expert has. Programs go through the rows of GROUP_M blocks before they come to the
    next columns, so that what they read of weights and rows is still in the cache.
    """
    columns = tl.cdiv(N, BLOCK_N)
    row_blocks = tl.num_programs(0) // columns
    program, group = tl.program_id(0), tl.program_id(0) // (GROUP_M * columns)
    height = tl.minimum(row_blocks - group * GROUP_M, GROUP_M)
    inside = program - group * GROUP_M * columns
    block = group * GROUP_M + inside % height
    expert, first, end = block_of(block, offsets, E, BLOCK_M, BLOCK_E)
    first += tl.where(expert == E, tl.load(offsets + E), 0)
    end = tl.where(expert == E, M, end)
    return expert, first + tl.arange(0, BLOCK_M), end, inside // height * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _multiply(
    x, weight, offsets, y, M, N, C, E, x_row, x_col, weight_expert, weight_row, weight_col,
    EVERY_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_E: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """y = x weightᵀ."""
    expert, row, end, col = _tile_of(M, N, offsets, E, BLOCK_M, BLOCK_N, GROUP_M, BLOCK_E)
    to = y + (row.to(INDEX) * N)[:, None] + col[None, :]
    stored = (row < end)[:, None] & (col < N)[None, :]
    if expert == E:
        if EVERY_ROW:
            tl.store(to, tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty), mask=stored)
        return
    from_x = x + (row.to(INDEX) * x_row)[:, None]
    from_weight = weight + expert.to(INDEX) * weight_expert + (col.to(INDEX) * weight_row)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        here = (row < end)[:, None] & (c < C)[None, :]
        rows = tl.load(from_x + c[None, :] * x_col, mask=here, other=0.0)
        there = (c < C)[:, None] & (col < N)[None, :]
        total = tl.dot(
            rows, tl.load(from_weight + c[:, None] * weight_col, mask=there, other=0.0), total, input_precision="ieee"
        )
    tl.store(to, total.to(y.dtype.element_ty), mask=stored)


@triton.jit
def _gated(
    x, weight, offsets, slots, hidden, M, N, C, E, K, limit,
    x_row, x_col, weight_expert, weight_row, weight_col,
    LIMITED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_E: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """hidden = silu(gate) · up: both products of the same tokens, which are read where they lie."""
    expert, row, end, col = _tile_of(M, N, offsets, E, BLOCK_M, BLOCK_N, GROUP_M, BLOCK_E)
    if expert == E:
        return
    token = tl.load(slots + row, mask=row < end, other=0) // K
    from_x = x + (token.to(INDEX) * x_row)[:, None]
    from_gate = weight + expert.to(INDEX) * weight_expert + (col.to(INDEX) * weight_row)[None, :]
    from_up = weight + expert.to(INDEX) * weight_expert + ((N + col).to(INDEX) * weight_row)[None, :]
    gate, up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        here = (row < end)[:, None] & (c < C)[None, :]
        rows = tl.load(from_x + c[None, :] * x_col, mask=here, other=0.0)
        there = (c < C)[:, None] & (col < N)[None, :]
        gates = tl.load(from_gate + c[:, None] * weight_col, mask=there, other=0.0)
        gate = tl.dot(rows, gates, gate, input_precision="ieee")
        ups = tl.load(from_up + c[:, None] * weight_col, mask=there, other=0.0)
        up = tl.dot(rows, ups, up, input_precision="ieee")
    if LIMITED:  # a minimum would lose NaN
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value = gate / (1.0 + tl.exp(-gate)) * up
    stored = (row < end)[:, None] & (col < N)[None, :]
    tl.store(hidden + (row.to(INDEX) * N)[:, None] + col[None, :], value.to(hidden.dtype.element_ty), mask=stored)
