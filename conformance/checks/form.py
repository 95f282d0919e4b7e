"""Outputs are plain tensors with the declared shape, dtype and device, contiguous, and share no memory with the
arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glm5_hal.conformance.trial import Finding, Trial
from glm5_hal.metadata import bind_axes, bind_dtypes, out_shapes
from glm5_hal.spec import OpSpec


def check(trial: Trial) -> Finding:
    found = problem(trial.spec, *trial.raw)
    return Finding(not found, found)


def problem(spec: OpSpec, placed: Mapping[str, Any], returned: Any) -> str:
    """What is wrong with what a call returned, "" for nothing."""
    values = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
    if len(values) != len(spec.outs):
        return f"returned {len(values)} values, the op has {len(spec.outs)}"
    tensors = {name: placed[name] for name in spec.tensors}
    dtypes = bind_dtypes(spec, {n: None if t is None else str(t.dtype)[6:] for n, t in tensors.items()})
    scalars = {name: placed[name] for name in spec.options}
    axes = bind_axes(spec, {n: None if t is None else tuple(t.shape) for n, t in tensors.items()}, scalars)
    device = next(t.device for t in tensors.values() if t is not None)
    owned = {_storage(t): name for name, t in tensors.items() if t is not None and t.numel()}
    for out, value, (shape, dtype) in zip(spec.outs, values, out_shapes(spec, axes, dtypes), strict=True):
        wrong = _problem(value, shape, dtype, device)
        if wrong is None and value.numel() and _storage(value) in owned:
            wrong = f"shares memory with {owned[_storage(value)]}"
        if wrong:
            return f"{out.name} {wrong}"
        owned |= {_storage(value): out.name} if value.numel() else {}
    return ""


def _problem(value: Any, shape: tuple[int, ...], dtype: str, device: torch.device) -> str | None:
    if type(value) is not torch.Tensor:
        return f"is a {type(value).__name__}, not a plain tensor"
    if tuple(value.shape) != tuple(shape):
        return f"has shape {tuple(value.shape)}, declared {tuple(shape)}"
    if str(value.dtype) != f"torch.{dtype}":
        return f"has dtype {value.dtype}, declared {dtype}"
    if value.device != device:
        return f"is on {value.device}, the inputs on {device}"
    if not value.is_contiguous():
        return f"is not contiguous: strides {value.stride()}"
    if value.is_neg() or value.is_conj():
        return "is not materialised: its memory holds its negative or its conjugate"
    return None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
