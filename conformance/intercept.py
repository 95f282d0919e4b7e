"""Every torch operation of a block of code, one by one: what checks that watch a kernel from outside are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

#: Given the operation (an OpOverload) and its arguments, what it returns.
Around = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Any]


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, around: Around) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._around = around

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._around(func, tuple(args), kwargs or {})


def operations(around: Around) -> AbstractContextManager[Any]:
    """Within it, ``around`` stands for every operation that this thread passes to torch's dispatcher: it calls the
    operation, and returns what that gave or something else. What an operation does inside itself is not seen."""
    return _Mode(around)
