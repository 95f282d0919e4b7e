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
from glm5_hal.metadata import out_shapes
from glm5_hal.signature import Signature, TensorMeta
from glm5_hal.spec import FLOATS, declared


@dataclass(frozen=True)
class Declared:
    """A kernel without a device: ``fn`` takes the tuning first, then what its op takes."""

    op: str
    fn: Callable[..., Any]
    requires: tuple[Requirement, ...]
    provides: frozenset[str]
    provider: str
    scratch: Callable[[Signature], int]

    def bound(self, tuning: Tuning) -> Kernel:
        requires = (*_floats(self.op, tuning), *_small(self.op, self.scratch, tuning), *self.requires)
        return Kernel(self.op, self.provider, partial(self.fn, tuning), requires, self.provides)


def triton_kernel(
    op: str,
    *,
    requires: Sequence[Requirement] = (),
    provides: Sequence[str] = (),
    provider: str = "triton",
    scratch: Callable[[Signature], int] = lambda call: 0,
) -> Callable[[Callable[..., Any]], Declared]:
    """Declare a function as the kernel of ``op``. Which floats it takes follows from the op and the tuning.
    ``scratch``: elements of the largest tensor that it makes for itself, where a call's shapes decide that."""

    def declare(fn: Callable[..., Any]) -> Declared:
        return Declared(op, fn, tuple(requires), frozenset(provides), provider, scratch)

    return declare


def _floats(op: str, tuning: Tuning) -> tuple[Requirement, ...]:
    """What the chip's compiler has of the float dtypes that the op's arguments may have."""
    found = []
    for arg in declared(op).args:
        may = declared(op).dtypes.get(arg.dtype, (arg.dtype,))
        if any(name in FLOATS for name in may):
            found.append(dtype(arg.name, *(name for name in may if name not in FLOATS or name in tuning.floats)))
    return tuple(found)


def _small(op: str, scratch: Callable[[Signature], int], tuning: Tuning) -> tuple[Requirement, ...]:
    """Where addresses are 32-bit numbers, no tensor may be larger than they reach."""
    if tuning.int64:
        return ()
    spec = declared(op)
    names = list(spec.tensors)
    sizes = {dim for out in spec.outs for dim in out.dims.split()}

    def fits(call: Signature) -> bool:
        given = max(_reach(meta) for name in names if (meta := call.tensors.get(name)) is not None)
        made = max((prod(shape) for shape, _ in out_shapes(spec, call.axes, {})), default=0)
        return max(given, made, scratch(call)) <= 2**31

    reads = [(name, what) for name in names for what in ("shape", "strides")]
    reads += [(name, "value") for name in spec.options if name in sizes]
    reason = "no tensor reaches over more than 2^31 elements, on a chip without int64"
    return (when(fits, reason, "split the batch", reads=tuple(reads)),)


def _reach(meta: TensorMeta) -> int:
    """From a tensor's first element to its last."""
    if meta.strides is None or 0 in meta.shape:
        return prod(meta.shape)
    return 1 + sum((size - 1) * abs(stride) for size, stride in zip(meta.shape, meta.strides, strict=True))


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
