"""Repairs of Triton's interpreter, versions 3.6 to 3.9, which computes bfloat16 wrong and says nothing.

It multiplies and adds the bits of bfloat16 as integers, rounds to bfloat16 and fp8 by cutting off, and reduces by xor
in a Python loop. Here: bfloat16 is widened, computed in fp32 and rounded to nearest even. Tiles are multiplied row by
row, so that a row has the same bits wherever it stands, as on a chip: on some CPUs NumPy's BLAS sums the last rows of a
tile in another order. A lock lets one thread
interpret at a time: for the length of a launch the interpreter replaces functions of ``triton.language``. Arguments
are taken as they are: copies of them would be allocations that no kernel asked for, and copying them back when a kernel
ends a write to every input. And functions of ``triton.language`` are replaced once in a launch, not at every call of a
device function, which took a third of the time.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_LOCK = threading.RLock()
#: Namespaces of device functions for which the launch that is running has replaced functions of triton.language.
_REPLACED: set[int] = set()


def apply() -> None:
    """Repair the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_glm5_hal_repaired", False):
        return
    builder._glm5_hal_repaired = True
    interpreter._convert_float = _converted(interpreter._convert_float)
    builder.create_dot = _dot(builder.create_dot)
    builder.binary_op = _binary(builder.binary_op)
    builder.unary_op = _unary(builder.unary_op)
    interpreter.ReduceOps.apply_impl = _reduced(interpreter.ReduceOps.apply_impl)
    interpreter._patch_lang = _once(interpreter._patch_lang)
    executor = interpreter.GridExecutor
    executor.__call__ = _alone(executor.__call__)
    executor._init_args_hst = _as_they_are
    executor._restore_args_dev = _nothing


def widened(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of fp32 values, rounded to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def row_by_row(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b in float32."""
    rows: np.ndarray = np.matmul(a[:, None, :], b, dtype=np.float32)[:, 0]
    return rows


def _converted(original: Any) -> Any:
    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if rounding == interpreter._ir.ROUNDING_MODE.RTZ or source not in _TORCH or target not in _TORCH:
            return original(values, source, target, rounding)
        raw = np.ascontiguousarray(values)
        if not raw.size:
            return np.empty(raw.shape, getattr(np, f"uint{target.primitive_bitwidth}"))
        given = torch.from_numpy(raw.reshape(-1).view(np.uint8).copy()).view(_TORCH[source])
        if target == tl.float8e4nv:  # hardware saturates, torch gives NaN
            given = given.float().clamp(-448, 448)
        bits = given.to(_TORCH[target]).contiguous().view(torch.uint8).numpy()
        return bits.view(getattr(np, f"uint{target.primitive_bitwidth}")).reshape(raw.shape)

    return convert


def _dot(original: Any) -> Any:
    def create_dot(self: Any, a: Any, b: Any, c: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        numbers = a.data.dtype.kind == b.data.dtype.kind == "f"  # fp8 is bits, which the original widens
        if numbers and c.data.dtype == np.float32 and a.data.ndim == 2:
            return interpreter.TensorHandle(row_by_row(a.data, b.data) + c.data, c.dtype.scalar)
        return original(self, a, b, c, *rest)

    return create_dot


def _binary(original: Any) -> Any:
    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return original(self, left, right, op)
        result = op(widened(left.data), widened(right.data))
        return interpreter.TensorHandle(result if op in _COMPARISONS else narrowed(result), left.dtype.scalar)

    return binary_op


def _unary(original: Any) -> Any:
    def unary_op(self: Any, value: Any, op: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return original(self, value, op)
        return interpreter.TensorHandle(narrowed(op(widened(value.data))), value.dtype.scalar)

    return unary_op


def _reduced(original: Any) -> Any:
    def apply_impl(self: Any, values: Any) -> Any:
        first = values[0]
        if self.combine_fn is tl.standard._xor_combine:
            reduced = np.bitwise_xor.reduce(first.handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(reduced, first.dtype)
        if first.dtype.scalar != tl.bfloat16:
            return original(self, values)
        out = original(self, (first.to(tl.float32), *values[1:]))
        out = out if isinstance(out, tuple) else (out,)
        return (out[0].to(tl.bfloat16), *out[1:])

    return apply_impl


def _once(original: Any) -> Any:
    def patch_lang(fn: Any) -> Any:
        if id(fn.__globals__) in _REPLACED:
            return None
        _REPLACED.add(id(fn.__globals__))
        return original(fn)

    return patch_lang


def _as_they_are(self: Any, args: Any, kwargs: Any) -> Any:
    """The tensors are in host memory already."""
    return args, kwargs


def _nothing(*_: Any) -> None:
    """The tensors are the host's own."""


def _alone(original: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _LOCK, np.errstate(all="ignore"):  # no chip warns of 0 / 0
            _REPLACED.clear()
            return original(self, *args, **kwargs)

    return call
