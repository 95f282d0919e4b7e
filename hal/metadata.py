"""What can be checked of a call without reading tensor values: the op's declaration against what was passed."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from glm5_hal.errors import HalError, shown
from glm5_hal.signature import Signature, TensorMeta
from glm5_hal.spec import Arg, OpSpec

#: Of float32.
_LARGEST = (2 - 2.0**-23) * 2.0**127

_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
}


@cache
def _parsed(dim: str) -> ast.expr:
    return ast.parse(dim, mode="eval").body


def evaluate(dim: str, axes: Mapping[str, Any]) -> Any:
    """The value of one dim expression. Works on symbolic sizes too; KeyError if an axis is not bound."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return axes[node.id]
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
        raise HalError(
            "CONTRACT", f"dim {dim!r} is not arithmetic on axes", value=dim, fix="use axes, integers, + - * // ()"
        )

    return value(_parsed(dim))


def axis_names(spec: OpSpec) -> frozenset[str]:
    """Every axis that the declaration of the arguments names."""
    dims = {dim for arg in spec.args for dim in arg.dims.split() if dim != "..."}
    return frozenset(node.id for dim in dims for node in ast.walk(_parsed(dim)) if isinstance(node, ast.Name))


def bind_axes(spec: OpSpec, shapes: Mapping[str, tuple[Any, ...] | None], scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Bind every axis of the declaration from the shapes. Raises HalError("SHAPE") at the first disagreement."""
    axes: dict[str, Any] = {k: v for k, v in scalars.items() if _is_a(v, int) and type(v).__name__ != "SymFloat"}
    for arg in spec.args:
        shape = shapes[arg.name]
        if shape is not None:
            _bind_one(spec, arg, tuple(shape), axes)
    return axes


def _bind_one(spec: OpSpec, arg: Arg, shape: tuple[Any, ...], axes: dict[str, Any]) -> None:
    dims = arg.dims.split()
    if "..." in dims:
        at = dims.index("...")
        extra = len(shape) - (len(dims) - 1)
        if extra < 0:
            raise _shape_error(spec, arg, shape, f"needs at least {len(dims) - 1} dims")
        middle = shape[at : at + extra]
        if axes.setdefault("...", middle) != middle:
            raise _shape_error(spec, arg, shape, f"leading dims should be {tuple(axes['...'])}")
        shape_rest = shape[:at] + shape[at + extra :]
        dims = dims[:at] + dims[at + 1 :]
    else:
        shape_rest = shape
        if len(shape) != len(dims):
            raise _shape_error(spec, arg, shape, f"needs {len(dims)} dims")
    for dim, size in zip(dims, shape_rest, strict=True):
        if dim.isidentifier() and dim not in axes:
            axes[dim] = size
            continue
        try:
            expected = evaluate(dim, axes)
        except KeyError as unbound:
            raise HalError(
                "CONTRACT",
                f"op {spec.name}: dim {dim!r} of {arg.name} uses {unbound} before it is bound",
                fix="reorder",
            ) from None
        if expected != size:
            raise _shape_error(spec, arg, shape, f"{dim} should be {expected}, not {size}")


def _shape_error(spec: OpSpec, arg: Arg, shape: tuple[Any, ...], why: str) -> HalError:
    return HalError(
        "SHAPE",
        f"{spec.name}: {arg.name} has shape {tuple(shape)}; it is [{', '.join(arg.dims.split())}] and {why}",
        value=tuple(shape),
        fix=f"pass {arg.name} as [{', '.join(arg.dims.split())}]: {arg.doc}",
    )


def bind_dtypes(spec: OpSpec, dtypes: Mapping[str, str | None]) -> dict[str, str]:
    """Bind the dtype variables. Raises HalError("DTYPE") at the first disagreement."""
    bound: dict[str, str] = {}
    for arg in spec.args:
        got = dtypes[arg.name]
        if got is None:
            continue
        allowed = spec.dtypes.get(arg.dtype, (arg.dtype,))
        wanted = (bound[arg.dtype],) if arg.dtype in bound else allowed
        if got not in wanted:
            raise HalError(
                "DTYPE",
                f"{spec.name}: {arg.name} is {got}, it should be {' or '.join(wanted)}",
                value=got,
                fix=f"convert with {arg.name}.to(torch.{wanted[0]})",
            )
        if arg.dtype in spec.dtypes:
            bound[arg.dtype] = got
    bound["acc"] = "float64" if bound.get("F") == "float64" else "float32"
    return bound


def checked_axes(
    spec: OpSpec, metas: Mapping[str, TensorMeta | None], scalars: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Axes and dtype variables of a call, real or traced, whose metadata is all that it should be but for strides,
    which a traced one does not have. Shapes may be symbolic. Raises HalError for the first fault: of a call with two,
    everyone names the same."""
    check_scalars(spec, scalars)
    dtypes = bind_dtypes(spec, {name: meta.dtype if meta else None for name, meta in metas.items()})
    axes = bind_axes(spec, {name: meta.shape if meta else None for name, meta in metas.items()}, scalars)
    check_constraints(spec, axes, scalars, {name: meta.dtype for name, meta in metas.items() if meta})
    check_device(spec, {name: meta.device if meta else None for name, meta in metas.items()})
    return axes, dtypes


def signature_of(spec: OpSpec, metas: Mapping[str, TensorMeta | None], scalars: Mapping[str, Any]) -> Signature:
    """Check a call's metadata against the declaration and bind its axes. Raises HalError before anything runs."""
    axes, _ = checked_axes(spec, metas, scalars)
    for arg in spec.args:
        meta = metas[arg.name]
        if meta is not None and not _laid_out(arg, meta):
            what = "contiguous within each page" if arg.layout == "page" else "contiguous"
            raise HalError(
                "STRIDE",
                f"{spec.name}: {arg.name} must be {what}, its strides are {meta.strides} for shape {meta.shape}",
                value=meta.strides,
                fix=f"allocate {arg.name} contiguous; a copy is never made for you",
            )
        if meta is not None and arg.name in spec.mutates and meta.overlapping:
            raise HalError(
                "STRIDE",
                f"{spec.name}: {arg.name} is written, and elements of it share memory: its strides are {meta.strides} "
                f"for shape {meta.shape}",
                value=meta.strides,
                fix=f"allocate {arg.name} whole; an expanded tensor is one row under many names",
            )
    return Signature(spec.name, dict(metas), dict(scalars), axes)


def _laid_out(arg: Arg, meta: TensorMeta) -> bool:
    return arg.layout == "any" or meta.contiguous_below(1 if arg.layout == "page" else 0)


def check_scalars(spec: OpSpec, scalars: Mapping[str, Any]) -> None:
    """Type, choices and range of every scalar. Symbolic ones have a type only."""
    for scalar in spec.scalars:
        got = scalars[scalar.name]
        kind = spec.signature.parameters[scalar.name].annotation
        if not _is_a(got, kind):
            code, wanted = "TYPE", _spelled(kind)
        elif got is None or _is_symbolic(got):
            continue
        elif scalar.choices and got not in scalar.choices:
            code, wanted = "SCALAR", f"one of {', '.join(map(repr, scalar.choices))}"
        elif not _fits(got):
            code, wanted = "SCALAR", "finite in float32" if isinstance(got, float) else "an integer of 32 bits"
        elif not (scalar.low is None or got >= scalar.low) or not (scalar.high is None or got <= scalar.high):
            bounds = ((">=", scalar.low), ("<=", scalar.high))
            code, wanted = "SCALAR", " and ".join(f"{sign} {b}" for sign, b in bounds if b is not None)
        else:
            continue
        what = f"{spec.name}: {scalar.name} is {shown(got)}, it should be {wanted}"
        raise HalError(code, what, value=got, fix=scalar.doc)


def _fits(value: Any) -> bool:
    """Kernels hold a number in fp32, and a count in 32 bits, as indices are."""
    if isinstance(value, float):
        return abs(value) <= _LARGEST
    return not isinstance(value, int) or -(2**31) <= value < 2**31


def _is_symbolic(value: Any) -> bool:
    return type(value).__name__ in ("SymInt", "SymFloat")


def _is_a(value: Any, kind: Any) -> bool:
    allowed = getattr(kind, "__args__", (kind,))
    if isinstance(value, bool):
        return bool in allowed
    if _is_symbolic(value):
        return True
    return any(isinstance(value, (float, int) if k is float else k) for k in allowed)


def _spelled(kind: Any) -> str:
    return " or ".join(getattr(k, "__name__", str(k)) for k in getattr(kind, "__args__", (kind,)))


def check_constraints(
    spec: OpSpec, axes: Mapping[str, Any], scalars: Mapping[str, Any], dtypes: Mapping[str, str]
) -> None:
    known = {**axes, **scalars, "dtypes": dtypes}
    for constraint in spec.constraints:
        if not constraint.test(known):
            seen = dtypes if constraint.code == "DTYPE" else {k: v for k, v in known.items() if k != "dtypes"}
            raise HalError(
                constraint.code,
                f"{spec.name}: {constraint.text}: not so for {', '.join(f'{k}={v}' for k, v in seen.items())}",
                value=seen,
                fix=constraint.fix,
            )


def check_device(spec: OpSpec, devices: Mapping[str, str | None]) -> None:
    first: tuple[str, str] | None = None
    for name, device in devices.items():
        if device is None:
            continue
        if first is None:
            first = (name, device)
        elif device != first[1]:
            raise HalError(
                "DEVICE",
                f"{spec.name}: {name} is on {device} and {first[0]} on {first[1]}",
                value=device,
                fix="move the tensors to one device; nothing is ever copied for you",
            )


def shape_of(dims: str, axes: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shape that dims spell out for bound axes."""
    shape: tuple[Any, ...] = ()
    for dim in dims.split():
        shape += tuple(axes["..."]) if dim == "..." else (evaluate(dim, axes),)
    return shape


def out_shapes(spec: OpSpec, axes: Mapping[str, Any], dtypes: Mapping[str, str]) -> list[tuple[tuple[Any, ...], str]]:
    """Shape and dtype of every output, from bound axes and dtype variables."""
    return [(shape_of(out.dims, axes), dtypes.get(out.dtype, out.dtype)) for out in spec.outs]
