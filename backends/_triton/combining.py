"""The experts' results, weighted and added: some tokens and columns to a program, experts one after the other.

Legend: T tokens, K experts per token, M rows of results, D hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.strided import tile
from glm5_hal.backends._triton.tuning import Tuning


@triton_kernel("moe_combine", provides=("deterministic", "batch_invariant", "graph_safe"))
def moe_combine(
    tuning: Tuning, y: Tensor, topk_weights: Tensor, inverse_ids: Tensor, shared: Tensor | None = None
) -> Tensor:
    return combined(tuning, y, topk_weights, inverse_ids, shared)


def combined(tuning: Tuning, y: Tensor, topk_weights: Tensor, inverse_ids: Tensor, shared: Tensor | None) -> Tensor:
    (T, K), D, sizes = inverse_ids.shape, y.shape[1], tuning["moe_combine"]
    out = y.new_empty(T, D)
    if not out.numel():
        return out
    meta = tile(sizes, D, sizes["BLOCK"])
    launch(
        _combine, (triton.cdiv(T, meta["ROWS"]), triton.cdiv(D, meta["COLS"])), y,
        y, topk_weights, inverse_ids, y if shared is None else shared, out, T, D,
        *y.stride(), *topk_weights.stride(), *inverse_ids.stride(), *((0, 0) if shared is None else shared.stride()),
        K=K, SHARED=shared is not None, INDEX=addresses(tuning), **meta,
    )  # fmt: skip
    return out


@triton.jit
def _combine(
    y, weights, inverse, shared, out, T, D,
    y_row, y_col, weights_row, weights_col, inverse_row, inverse_col, shared_row, shared_col,
    K: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    there, wide = token < T, (col < D)[None, :]
    at = token.to(INDEX)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.static_range(K):  # unrolled, so that rows are loaded while others are added
        # Offsets are added before the pointer: one compiler takes no pointer that loads of several slots go on from.
        row = tl.load(inverse + (at * inverse_row + k * inverse_col), mask=there, other=-1)
        here = row >= 0
        weight = tl.load(weights + (at * weights_row + k * weights_col), mask=here, other=0.0)
        place = (row.to(INDEX) * y_row)[:, None] + col[None, :] * y_col
        value = tl.load(y + place, mask=here[:, None] & wide, other=0.0)
        total += weight[:, None] * value.to(tl.float32)
    stored = there[:, None] & wide
    if SHARED:
        from_shared = shared + (at * shared_row)[:, None]
        total += tl.load(from_shared + col[None, :] * shared_col, mask=stored, other=0.0).to(tl.float32)
    tl.store(out + (at * D)[:, None] + col[None, :], total.to(out.dtype.element_ty), mask=stored)
