"""Prepared weights: packed once, when they are loaded. Without that a weight is repacked at every call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm5_hal.errors import HalError, shown, suggest
from glm5_hal.plugins.isolation import attempted, told
from glm5_hal.spec import declared

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prepared:
    """Weights in the form that a backend likes best, made once at load time.

    Every tensor keeps the shape and dtype of the plain weight (a vendor's storage format, padding or strides may lie
    beneath), so one schema serves all; ``format`` goes into the op's ``weight_format`` argument, and a kernel that
    does not declare that format refuses the call.
    """

    op: str
    tensors: Mapping[str, torch.Tensor]
    format: str = "plain"

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def prepare(op: str, weights: Mapping[str, torch.Tensor], *, backend: str) -> Prepared:
    """Let a backend prepare an op's weights. Without a form of its own it gets them contiguous, format "plain".

    Args:
        op: the op that will use them.
        weights: plain weights by the op's argument names.
        backend: who will compute with them.

    Raises:
        HalError: UNKNOWN for an op, backend or argument that does not exist; CONTRACT if the backend changed a shape
            or dtype; PLUGIN if it raised.
    """
    import torch

    from glm5_hal import context

    spec = declared(op)
    for name in weights:
        if name not in spec.tensors:
            raise HalError("UNKNOWN", f"{op} has no argument {name!r}", value=name, fix=suggest(name, spec.tensors))
    own = context.catalogue().backend(backend).prepare
    made, problem = (None, None) if own is None else attempted(lambda: own(op, weights))
    if isinstance(problem, HalError):
        raise problem
    if problem is not None:
        root = context.catalogue().record(backend).root
        raise HalError(
            "PLUGIN",
            f"backend {backend}: preparing {op} raised {told(problem, root)[0]}",
            value=problem,
            fix="report it to the backend's maintainer",
        ) from problem
    if made is None:
        return Prepared(op, {name: t.contiguous() for name, t in weights.items()})
    if not (isinstance(made, Prepared) and made.op == op and isinstance(made.tensors, Mapping)):
        raise HalError(
            "CONTRACT",
            f"backend {backend}: preparing {op} returned {shown(made)}",
            value=made,
            fix=f"return None, or glm5_hal.Prepared({op!r}, ...)",
        )
    if made.format != "plain" and "weight_format" not in spec.options:
        raise HalError(
            "CONTRACT",
            f"backend {backend}: preparing {op} gave format {made.format!r}, which {op} cannot be told",
            value=made.format,
            fix="only ops with a weight_format argument take prepared weights",
        )
    for name, plain in weights.items():
        form = made.tensors.get(name)
        if not isinstance(form, torch.Tensor) or form.shape != plain.shape or form.dtype != plain.dtype:
            raise HalError(
                "CONTRACT",
                f"backend {backend}: preparing {op} changed or dropped {name}",
                value=name,
                fix="prepared weights keep the name, shape and dtype of the plain ones",
            )
    return made
