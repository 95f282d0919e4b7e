"""What leaves a stand-in device for the host: noted with the line that asked for it, or refused; and what is captured
into a graph, where nothing may."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Read:
    """A value that left the device.

    Attributes:
        kind: "copy" (a tensor), "value" (`.item()`, `bool()`, `torch.equal`) or "size" (a result whose shape depends on
            values, such as `nonzero`).
        op: torch's operation.
        shape: of what was read.
        site: the line that asked for it, outside of torch.
    """

    kind: str
    op: str
    shape: tuple[int, ...]
    site: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.op} of {list(self.shape)}, at {self.site}"


class HiddenReadError(RuntimeError):
    """Something left the device where that is refused."""


@dataclass(frozen=True)
class _Watch:
    refused: str
    reads: list[Read] = field(default_factory=list)


Steps = list[Callable[[], None]]

_watches: ContextVar[tuple[_Watch, ...]] = ContextVar("simulated_watches", default=())
_steps: ContextVar[Steps | None] = ContextVar("simulated_steps", default=None)


@contextmanager
def watched(*, strict: bool = False, why: str = "nothing may leave the device here") -> Iterator[list[Read]]:
    """What leaves the device in this block, in this thread or task. ``strict``: it is refused."""
    watch = _Watch(why if strict else "")
    token = _watches.set((*_watches.get(), watch))
    try:
        yield watch.reads
    finally:
        _watches.reset(token)


@contextmanager
def recorded() -> Iterator[Steps]:
    """The operations of this block, each as a call that computes into the same memory again. As in a device graph,
    nothing can leave the device meanwhile, or come to it from the host's pageable memory."""
    steps: Steps = []
    token = _steps.set(steps)
    try:
        with watched(strict=True, why="a graph is being captured"):
            yield steps
    finally:
        _steps.reset(token)


def recording() -> Steps | None:
    """Where the operations go, while a graph is being captured."""
    return _steps.get()


def note(kind: str, op: Any, tensor: Tensor) -> None:
    """Something is about to leave."""
    if not (watches := _watches.get()):
        return
    read = Read(kind, str(op), tuple(tensor.shape), site())
    for watch in watches:
        watch.reads.append(read)
        if watch.refused:
            raise HiddenReadError(f"{watch.refused}; {read}")


def site() -> str:
    """The innermost line that is neither torch's nor this package's."""
    frame, passed = sys._getframe(1), (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    while frame.f_back is not None and frame.f_code.co_filename.startswith(passed):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
