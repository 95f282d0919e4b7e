"""Bodies: a kernel as a function of one namespace of arguments.

``kernel`` gives a body the signature of its op. What a body may do in more than one way is an argument of its own, so
that a wrong kernel is an honest one with one thing changed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from glm5_hal.ops import specs

Args = SimpleNamespace
Body = Callable[[Any], Any]
Product = Callable[[Tensor, Tensor], Tensor]


def kernel(op: str, body: Body) -> Callable[..., Any]:
    """A function with the op's signature."""
    signature = specs()[op].signature

    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return body(SimpleNamespace(**bound.arguments))

    run.__signature__ = signature  # type: ignore[attr-defined]
    return run
