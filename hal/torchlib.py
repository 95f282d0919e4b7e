"""Every op as a torch.library operator, derived from its spec: schema, fake, and the refusal of gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from glm5_hal.errors import HalError
from glm5_hal.metadata import checked_axes, out_shapes
from glm5_hal.signature import TensorMeta
from glm5_hal.spec import Arg, OpSpec

NAMESPACE = "glm5"


@cache
def _library() -> torch.library.Library:
    return torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def schema(spec: OpSpec) -> str:
    """The torch schema, read from the reference's annotations: "(Tensor x, Tensor weight, *, float eps) -> Tensor"."""

    def prototype() -> None: ...

    prototype.__signature__ = spec.signature  # type: ignore[attr-defined]
    return str(torch.library.infer_schema(prototype, mutates_args=spec.mutates))


def register(spec: OpSpec, call: Callable[..., Any]) -> Any:
    """Define ``torch.ops.glm5.<name>``. Its implementation is the op itself, so eager calls through torch reach the
    same table; gradients are refused there and at trace time."""
    library = _library()
    if not hasattr(getattr(torch.ops, NAMESPACE), spec.name):
        library.define(spec.name + schema(spec), tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        library.impl(spec.name, call, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{spec.name}", fake(spec), lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), spec.name).default


def differentiable(spec: OpSpec, arg: Arg) -> bool:
    """Whether an argument may be of a dtype that could require a gradient."""
    return any("float" in dtype for dtype in spec.dtypes.get(arg.dtype, (arg.dtype,)))


def no_gradient(spec: OpSpec) -> HalError:
    return HalError(
        "GRAD",
        f"{spec.name} has no gradient, and an argument requires one",
        fix="call it under torch.inference_mode() or torch.no_grad(), or detach the arguments",
    )


def fake(spec: OpSpec) -> Callable[..., Any]:
    """Outputs without values: shapes and dtypes from the declaration, contiguous, on the inputs' device."""

    def outputs(*args: Any, **kwargs: Any) -> Any:
        arguments = spec.bind(*args, **kwargs)
        tensors = {name: arguments[name] for name in spec.tensors}
        # Compiled code runs without autograd: what is not refused while it is traced would be lost in silence.
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values()):
            raise no_gradient(spec)
        metas = {
            n: None if t is None else TensorMeta(str(t.dtype)[6:], tuple(t.shape), str(t.device))
            for n, t in tensors.items()
        }
        # Devices too: torch sends a call with one meta tensor here, and its outputs would be memory that nobody wrote.
        axes, dtypes = checked_axes(spec, metas, {name: arguments[name] for name in spec.options})
        device = next(t.device for t in tensors.values() if t is not None)
        made = tuple(
            torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            for shape, dtype in out_shapes(spec, axes, dtypes)
        )
        return made if len(made) > 1 else made[0] if made else None

    return outputs
