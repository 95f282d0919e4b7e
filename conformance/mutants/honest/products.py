"""Sums in fp32 and products [m, k] x [n, k] -> [m, n], in the orders that real kernels have."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sequential_sum(terms: Tensor) -> Tensor:
    """Over the last dim in fp32, one after the other (torch.cumsum accumulates in double on a CPU)."""
    if terms.shape[-1] == 0:
        return terms.new_zeros(terms.shape[:-1])
    return torch.from_numpy(np.add.accumulate(terms.numpy(), axis=-1, dtype=np.float32)[..., -1].copy())


def pairwise_sum(terms: Tensor) -> Tensor:
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = torch.nn.functional.pad(terms, (0, 1))
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.transpose(-1, -2)


def einsum(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("...mk,...nk->...mn", a, b)


def row_by_row(a: Tensor, b: Tensor) -> Tensor:
    rows = [(b @ row[..., None])[..., 0] for row in a.unbind(-2)]
    return torch.stack(rows, -2) if rows else a.new_zeros(*a.shape[:-1], b.shape[-2])


def sequential(a: Tensor, b: Tensor) -> Tensor:
    return sequential_sum(a[..., :, None, :] * b[..., None, :, :])


def blocked(a: Tensor, b: Tensor) -> Tensor:
    """In blocks of 16, as a tile's inner loop is."""
    out = a[..., :16] @ b[..., :16].transpose(-1, -2)
    for start in range(16, a.shape[-1], 16):
        out = out + a[..., start : start + 16] @ b[..., start : start + 16].transpose(-1, -2)
    return out


def halving(a: Tensor, b: Tensor) -> Tensor:
    return pairwise_sum(a[..., :, None, :] * b[..., None, :, :])


def in_double(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().transpose(-1, -2)).float()
