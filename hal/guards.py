"""What torch knows of tensors beyond their public API: do they look as they did before, and are they wrappers.

`tensor_guard` is one C++ call that says whether tensors look exactly as they did before. torch compiles such guards for
its own compiler. They cost a third of a Python tuple of dtypes, sizes and devices (0.55 against 1.8 µs for six
tensors), and check at least as much. They are not public API: where a torch build lacks them or has changed them,
`tensor_guard` answers None and the dispatcher uses its table alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch


def tensor_guard(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """A check that later tensors equal these in type, dtype, sizes, strides, device and need of a gradient.

    It says no where a gradient is asked for: those calls are refused elsewhere.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        guard = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.size()) for t in tensors],  # type: ignore[misc]
            dynamic_dims_strides=[list(t.stride()) for t in tensors],  # type: ignore[misc]
        )
        check: Callable[..., bool] = guard.check
        # A guard that does not know its own tensors, or any others apart, is not the one this was written for.
        if check(*tensors) is True and check(*(t.new_empty((0,) * (t.dim() + 1)) for t in tensors)) is False:
            if any(t.requires_grad for t in tensors):
                return lambda *now: not torch.is_grad_enabled() and check(*now)
            return check
    except (ImportError, AttributeError, TypeError, RuntimeError):
        pass
    return None


def innermost_transform() -> Any:
    """The torch.func transform that runs here and now (vmap, grad, jvp), or None."""
    return _functorch("peek_interpreter_stack")()


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a torch.func transform stands between this tensor and its memory."""
    return bool(_functorch("is_functorch_wrapped_tensor")(tensor))


@cache
def _functorch(name: str) -> Callable[..., Any]:
    return getattr(getattr(torch._C, "_functorch", None), name, lambda *_: None)
