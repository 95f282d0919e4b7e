"""Where a reference rounds. Inside ``exact()`` nothing is rounded and everything is float64: that run is the oracle.

A reference reads ``up(x)`` to compute, ``stored(p, x)`` where the rounding contract stores an intermediate, and
``down(y, x)`` for its output. Run plainly it is the honest emulation in the storage dtype; run inside ``exact()``
on the very same inputs it is the truth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from glm5_hal.ops._common import products

_exact: ContextVar[bool] = ContextVar("glm5_hal_exact", default=False)


@contextmanager
def exact() -> Iterator[None]:
    """Compute references in float64 without any rounding, whatever the inputs' dtype."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


def is_exact() -> bool:
    return _exact.get()


def up(x: Tensor) -> Tensor:
    """To the accumulation dtype: float32, or float64 where the input is float64 or the run is exact."""
    return x.double() if is_exact() or x.dtype == torch.float64 else x.float()


def down(y: Tensor, like: Tensor) -> Tensor:
    """To the storage dtype of ``like``; no rounding in an exact run."""
    return y if is_exact() else y.to(like.dtype)


def stored(p: Tensor, like: Tensor) -> Tensor:
    """An intermediate that the contract stores in the dtype of ``like``, back in the accumulation dtype."""
    return p if is_exact() else p.to(like.dtype).to(p.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ, weight as [out, in], accumulated in fp32 or wider and rounded once at the end."""
    return x.double() @ weight.double().T if is_exact() else products.linear(x, weight)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of one storage dtype: see `linear`."""
    return a.double() @ b.double() if is_exact() else products.multiply(a, b)
