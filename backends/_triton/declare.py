"""How a Triton kernel is declared, bound to a device's tuning, and launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from glm5_hal.backend import Kernel
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.capability import dtype, when
from glm5_hal.decision import Requirement
from glm5_hal.signature import Signature
from glm5_hal.spec import FLOATS, declared


@dataclass(frozen=True)
class Declared:
    """A kernel without a device: ``fn`` takes the tuning first, then what its op takes."""

    op: str
    fn: Callable[..., Any]
    requires: tuple[Requirement, ...]
    provides: frozenset[str]
    provider: str

    def bound(self, tuning: Tuning) -> Kernel:
        requires = (*_floats(self.op, tuning), *_small(self.op, tuning), *self.requires)
        return Kernel(self.op, self.provider, partial(self.fn, tuning), requires, self.provides)


def triton_kernel(
    op: str, *, requires: Sequence[Requirement] = (), provides: Sequence[str] = (), provider: str = "triton"
) -> Callable[[Callable[..., Any]], Declared]:
    """Declare a function as the kernel of ``op``. Which floats it takes follows from the op and the tuning."""

    def declare(fn: Callable[..., Any]) -> Declared:
        return Declared(op, fn, tuple(requires), frozenset(provides), provider)

    return declare


def _floats(op: str, tuning: Tuning) -> tuple[Requirement, ...]:
    """What the chip's compiler has of the float dtypes that the op's arguments may have."""
    found = []
    for arg in declared(op).args:
        may = declared(op).dtypes.get(arg.dtype, (arg.dtype,))
        if any(name in FLOATS for name in may):
            found.append(dtype(arg.name, *(name for name in may if name not in FLOATS or name in tuning.floats)))
    return tuple(found)


def _small(op: str, tuning: Tuning) -> tuple[Requirement, ...]:
    """Where addresses are 32-bit numbers, no tensor may be larger than they reach."""
    if tuning.int64:
        return ()
    names = [arg.name for arg in declared(op).args]

    def fits(call: Signature) -> bool:
        return all(prod(meta.shape) < 2**31 for name in names if (meta := call.tensors.get(name)) is not None)

    reads = tuple((name, "shape") for name in names)
    return (when(fits, "no tensor has 2^31 elements or more, on a chip without int64", "split the batch", reads=reads),)


def addresses(tuning: Tuning) -> Any:
    """The integer type that offsets into large tensors are computed in."""
    return tl.int64 if tuning.int64 else tl.int32


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **meta: Any) -> None:
    """Run ``kernel`` on the device of ``like``, which need not be the current one. An empty grid runs nothing."""
    if prod(grid) == 0:
        return
    module = getattr(torch, like.device.type)
    if like.device.type == "cpu" or like.device.index == module.current_device():
        kernel[grid](*args, **meta)
        return
    with module.device(like.device):
        kernel[grid](*args, **meta)
