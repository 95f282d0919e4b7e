"""What storage does to numbers: unit roundoff, spacing, and where an infinity or a NaN stands."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glm5_hal.errors import HalError

#: Unit roundoff: half the distance from 1 to the next number above it.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}

#: Tensors are measured in blocks of rows of about this many elements, which bounds the memory of float64 copies.
BLOCK = 1 << 22

#: Keeps 0/0 at 0.
TINY = 1e-300


def unit_roundoff(dtype: str) -> float:
    """u of a storage dtype, by torch name."""
    if dtype not in UNIT:
        raise HalError("UNKNOWN", f"no unit roundoff for dtype {dtype!r}", value=dtype, fix=f"known: {', '.join(UNIT)}")
    return UNIT[dtype]


def storage(unit: float) -> torch.dtype:
    return next((getattr(torch, name) for name, u in UNIT.items() if u == unit), torch.float64)


def stored(t: Tensor, unit: float) -> Tensor:
    return t.to(storage(unit)).double()


def half_spacing(y: Tensor, unit: float) -> Tensor:
    """The most that rounding to nearest moves y."""
    mantissa, _ = torch.frexp(y)
    half = unit * torch.where(y == 0, 0.0, y / (2 * mantissa))
    # float16's subnormals, down to 2**-24, are kept by all hardware; those of the wide exponents it may flush to zero.
    return half.clamp_min(min(torch.finfo(storage(unit)).smallest_normal, 2.0**-24))


def strange(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y.isfinite(), ~x.isfinite(), (x != y) & ~(x.isnan() & y.isnan()))


def blocks(R: int, n: int) -> Iterator[slice]:
    step = max(BLOCK // max(n, 1), 1)
    return (slice(i, i + step) for i in range(0, R, step))
