"""Tensors [..., D] as rows, read where they lie, and how many rows and columns of them one program takes.

Legend: N rows, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor


def rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """``(x, inner, outer_step, inner_step)``, from which ``row_start`` finds each row of ``x [..., D]``.

    Two steps reach every row of a tensor that is a slice, or has two dims swapped. Where they do not, it is copied.
    """
    steps: list[tuple[int, int]] = []  # (rows, step) from the outermost dim on; dims that continue another are one
    for count, step in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if steps and steps[-1][1] == count * step:
            steps[-1] = (steps[-1][0] * count, step)
        elif count > 1:
            steps.append((count, step))
    if len(steps) > 2:
        return rows(x.contiguous())
    if len(steps) < 2:  # a division by 1 is compiled away; one row gets the code, so the bits, of many
        return x, 1, steps[0][1] if steps else x.shape[-1] * x.stride(-1), 0
    return x, steps[1][0], steps[0][1], steps[1][1]


def tile(sizes: Mapping[str, int], D: int, most: int | None = None) -> dict[str, int]:
    """``sizes`` with BLOCK, the numbers that a program takes, as ROWS and COLS. A row is in one piece unless there
    are more than ``most`` columns."""
    rest = dict(sizes)
    block = rest.pop("BLOCK")
    cols = triton.next_power_of_2(D if most is None else min(D, most))
    return {"ROWS": max(1, block // cols), "COLS": cols, **rest}


@triton.jit
def row_start(row, inner, outer_step, inner_step, INDEX: tl.constexpr):
    """Where the rows ``row`` begin, in elements."""
    return (row // inner).to(INDEX) * outer_step + (row % inner).to(INDEX) * inner_step
