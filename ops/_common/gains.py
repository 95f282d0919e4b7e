"""Weights that may be wider than the activations: gains and biases of norms, the indexer's head weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm5_hal.spec import BadInput, Constraint, Draw


def as_wide(*names: str, activations: str = "x") -> Constraint:
    """Each has the activations' dtype, or float32."""

    def fits(known: Mapping[str, Any]) -> bool:
        dtypes = known["dtypes"]
        return all(dtypes[name] in (dtypes[activations], "float32") for name in names)

    return Constraint(
        f"{', '.join(names)} in the dtype of {activations} or in float32",
        fits,
        f"pass {' and '.join(names)} in the dtype of {activations}, or in float32",
        code="DTYPE",
    )


def wide(draw: Draw, size: int, activations: str, scale: float = 1.0) -> Tensor:
    """float32 gains that all lose the same share, in the same direction, where they are rounded to the dtype of the
    activations: a kernel that reads them as such is off by more than chance. ``scale`` is a power of two."""
    share = torch.finfo(getattr(torch, activations)).eps * 7 / 16
    return scale * 2.0 ** draw.integers(-2, 1, size).float() * (1.0 + share)


def errors(*names: str) -> tuple[BadInput, ...]:
    """Each of them wider than float32, with activations that are not."""

    def spoil(name: str, args: dict[str, Any]) -> dict[str, Any]:
        return {**args, name: args[name].double()}

    return tuple(BadInput(f"{name}_dtype", "DTYPE", partial(spoil, name)) for name in names)
