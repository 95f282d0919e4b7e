"""Where a reference rounds. Inside ``exact()`` nothing is rounded and everything is float64: that run is the oracle.

A reference reads ``up(x)`` to compute, ``stored(p, x)`` where the rounding contract stores an intermediate, and
``down(y, x)`` for its output. Run plainly it is the honest emulation in the storage dtype; run inside ``exact()``
on the very same inputs it is the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

#: Rows of float16 for which converting the weights takes longer than multiplying them as they are.
FEW = 8

#: Products by device type, of a backend on whose device torch's own may round a sum on the way. A backend puts its own
#: here where its kernels are loaded.
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}

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
    """x @ weightᵀ, weight as [out, in]: see `matmul`."""
    return matmul(x, weight.transpose(-1, -2))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of one storage dtype, accumulated in fp32 or wider and rounded once at the end: see `multiply`."""
    return a.double() @ b.double() if is_exact() else multiply(a, b)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """torch's own product, so that weights are not converted at every call; into ``out``, if that is given.

    In float16 a CPU has a fast product only for few rows over weights that lie [out, in]: then it reads each weight
    once. All others are faster in float32, up to a hundred times, the time to convert included.

    Devices for which a backend has a product of its own have that: see `PRODUCTS`.
    """
    own = PRODUCTS.get(a.device.type)
    if own is not None:
        return own(a, b) if out is None else out.copy_(own(a, b))
    few = a.dim() == 2 and a.shape[0] <= FEW and b.stride(0) == 1
    if a.dtype == torch.float16 and a.device.type == "cpu" and not few:
        wide = a.float() @ b.float()
        return wide.to(a.dtype) if out is None else out.copy_(wide)
    return torch.matmul(a, b, out=out)
