"""A plugin's code at arm's length: its output caught, its deadline kept, and what it raised told with its place."""

from __future__ import annotations

import inspect
import io
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, TypeVar

from glm5_hal.errors import HalError

T = TypeVar("T")

#: How much of what a plugin prints is kept: the end, in characters.
OUTPUT_LIMIT = 65536


@dataclass(frozen=True)
class Outcome:
    """What came of a plugin's code: a value, a problem, or (``stuck``) nothing yet, and where it was last seen."""

    value: Any
    problem: BaseException | None
    stuck: str | None
    output: str


def guarded(call: Callable[[], Any], deadline: float | None, root: str) -> Outcome:
    """Run a plugin's code with what it prints caught: in a thread, or in this one where there is no deadline.

    A thread cannot be killed: one that is stuck at its deadline is left behind. A KeyboardInterrupt in this thread is
    the user's and passes through; in another it is the plugin's own.
    """
    done: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            done.append((call(), None))
        except BaseException as problem:  # noqa: BLE001 - a plugin may raise SystemExit, or what pytest.skip raises
            done.append((None, problem))

    thread = threading.Thread(target=work, name=f"glm5-hal plugin {root}", daemon=True)
    with _captured(threading.current_thread() if deadline is None else thread) as kept:
        if deadline is None:
            work()
        else:
            thread.start()
            thread.join(deadline)
    output = kept.getvalue().decode(errors="replace")[-OUTPUT_LIMIT:]
    if not done:
        frames = traceback.walk_stack(sys._current_frames().get(thread.ident or 0))
        return Outcome(None, None, _place(reversed(list(frames)), root), output)
    value, problem = done[0]
    if isinstance(problem, KeyboardInterrupt) and deadline is None:
        raise problem
    return Outcome(value, problem, None, output)


def attempted(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What a plugin's code gives, or what it raised: for the small questions that are asked on the way, often.

    A plugin's objects are not only called: reading an attribute, comparing or printing one runs its code as well, which
    may raise anything, SystemExit too. A KeyboardInterrupt is the user's and passes through.
    """
    try:
        return call(), None
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # noqa: BLE001 - it is handed back, to be told
        return None, problem


class _Kept(io.BytesIO):
    """A plugin may wrap or close what it takes for stdout; what it wrote stays readable, its end where it is much."""

    def write(self, data: Any) -> int:
        written = super().write(data)
        if self.tell() > 2 * OUTPUT_LIMIT:  # what prints without end must not fill the memory
            end = self.getvalue()[-OUTPUT_LIMIT:]
            self.seek(0)
            self.truncate()
            super().write(end)
        return written

    def close(self) -> None:
        pass


class _Route:
    """Stands in for stdout or stderr: one thread writes into the sink, the others to where they always did."""

    def __init__(self, original: Any, thread: threading.Thread, sink: io.TextIOWrapper) -> None:
        self.original, self.thread, self.sink = original, thread, sink
        self.open = True

    def __getattr__(self, name: str) -> Any:
        caught = self.open and threading.current_thread() is self.thread and name != "fileno"
        return getattr(self.sink if caught else self.original, name)


@contextmanager
def _captured(thread: threading.Thread) -> Iterator[_Kept]:
    """Catch what ``thread`` prints. If it still runs at the end, its output stays caught: it would spoil `--json`."""
    kept = _Kept()
    sink = io.TextIOWrapper(kept, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
    routes = {name: _Route(getattr(sys, name), thread, sink) for name in ("stdout", "stderr") if getattr(sys, name)}
    for name, route in routes.items():
        setattr(sys, name, route)
    try:
        yield kept
    finally:
        lingers = thread is not threading.current_thread() and thread.is_alive()
        for name, route in routes.items():
            route.open = lingers
            setattr(sys, name, route if lingers else route.original)


def told(problem: BaseException, root: str = "") -> tuple[str, str]:
    """An exception in one line, with the place in the plugin, and its own fix if it has one."""
    words, _ = attempted(lambda: _words(problem))  # an exception's own __str__ may be broken too, or leave
    text, fix = words or ("its message cannot be read", "")
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    kind = type(problem).__name__
    said = f"{kind}: {line}" if line else kind
    place, _ = attempted(lambda: _place_of(problem, root))
    return said + (place or ""), fix


def _words(problem: BaseException) -> tuple[str, str]:
    if not isinstance(problem, HalError):
        return plain(str(problem)), ""
    return plain(str(problem.what)), plain(problem.fix) if isinstance(problem.fix, str) else ""


def _place_of(problem: BaseException, root: str) -> str:
    if isinstance(problem, SyntaxError) and problem.filename:
        return f", at {problem.filename}:{problem.lineno}"
    return _place(traceback.walk_tb(problem.__traceback__), root)


def plain(text: str) -> str:
    """A text without the methods of its own that a subclass of str may have, such as torch's version."""
    return str.__str__(text)


def defined_at(thing: object) -> str:
    """``, at file:line`` of a function, or nothing."""
    code, _ = attempted(lambda: getattr(inspect.unwrap(thing), "__code__", None) if callable(thing) else None)
    return f", at {code.co_filename}:{code.co_firstlineno}" if isinstance(code, CodeType) else ""


def kind_of(value: object) -> str:
    return type(value).__qualname__


def _place(frames: Iterable[tuple[FrameType, int]], root: str) -> str:
    """``, at file:line`` of the innermost frame that is the plugin's own; the outermost frame comes first."""
    own = ""
    for frame, line in frames:
        name = frame.f_globals.get("__name__")
        if isinstance(name, str) and (name == root or name.startswith(f"{root}.")):
            own = f", at {frame.f_code.co_filename}:{line}"
    return own
