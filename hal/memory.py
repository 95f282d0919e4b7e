"""Which tensors lie in the same memory: what a call writes must be no other argument of it. And whether a tensor still
is what it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm5_hal.errors import HalError
from glm5_hal.spec import OpSpec

if TYPE_CHECKING:
    import torch


def check_apart(spec: OpSpec, args: Mapping[str, Any]) -> None:
    """Raise HalError("STRIDE") where a written argument shares memory with another one."""
    given = {name: args[name] for name in spec.tensors if args[name] is not None}
    for written in (name for name in spec.mutates if name in given):
        for name, tensor in given.items():
            if name != written and _shared(given[written], tensor):
                raise HalError(
                    "STRIDE",
                    f"{spec.name}: {name} shares memory with {written}, which is written",
                    value=name,
                    fix=f"pass {name} as a tensor of its own: {name}.clone()",
                )


def _shared(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may have a byte in common. Fields of one buffer's pages have none: each keeps its place in
    the page."""
    if not a.numel() or not b.numel():
        return False
    first, second = a.data_ptr(), b.data_ptr()
    if first + _span(a) <= second or second + _span(b) <= first:
        return False
    if not a.dim() or not b.dim():
        return True
    page = a.stride(0) * a.itemsize
    if not page or page != b.stride(0) * b.itemsize:
        return True
    apart = (second - first) % page
    return apart < _span(a[0]) or apart + _span(b[0]) > page


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.itemsize


def version(tensor: torch.Tensor) -> int:
    """How often a tensor has been written. Inference tensors have no counter, and a write to one is not seen."""
    return 0 if tensor.is_inference() else tensor._version


def state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What changes when a tensor is written, moved, converted or given other data."""
    return version(tensor), tensor.data_ptr(), tensor.dtype, tensor.device
