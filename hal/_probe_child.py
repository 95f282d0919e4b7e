"""A plugin's code at arm's length: in a thread that may be given up, or in a child process that may die.

`guarded` runs a call with its output caught and its deadline kept. `ask` and `answer` are the two ends of a probe in a
child process: one line of JSON on the child's first stdout; whatever the plugin prints goes to stderr.
"""

from __future__ import annotations

import faulthandler
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.errors import HalError

if TYPE_CHECKING:
    from glm5_hal.plugins import PluginRecord

#: How much of what a plugin prints is kept, in characters.
OUTPUT_LIMIT = 65536
#: Seconds that a child may take to be gone once it has answered or was killed.
GRACE = 2.0


# In this process


@dataclass(frozen=True)
class Outcome:
    """What came of a plugin's code: a value, a problem, or (``stuck``) nothing yet, and where it was last seen."""

    value: Any
    problem: BaseException | None
    stuck: str | None
    seconds: float
    output: str


def guarded(call: Callable[[], Any], deadline: float | None, root: str) -> Outcome:
    """Run a plugin's code with what it prints caught: in a thread, or in this one where there is no deadline.

    A thread cannot be killed: one that is stuck at its deadline is left behind. KeyboardInterrupt passes through.
    """
    done: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            done.append((call(), None))
        except BaseException as problem:  # noqa: BLE001 - a plugin may raise SystemExit, or what pytest.skip raises
            done.append((None, problem))

    start = time.perf_counter()
    thread = threading.Thread(target=work, name=f"glm5-hal plugin {root}", daemon=True)
    with _captured(threading.current_thread() if deadline is None else thread) as kept:
        if deadline is None:
            work()
        else:
            thread.start()
            thread.join(deadline)
    seconds = time.perf_counter() - start
    output = kept.getvalue().decode(errors="replace")[:OUTPUT_LIMIT]
    if not done:
        frames = traceback.walk_stack(sys._current_frames().get(thread.ident or 0))
        return Outcome(None, None, _place(reversed(list(frames)), root), seconds, output)
    value, problem = done[0]
    if isinstance(problem, KeyboardInterrupt):
        raise problem
    return Outcome(value, problem, None, seconds, output)


class _Kept(io.BytesIO):
    """A plugin may wrap or close what it takes for stdout; what it wrote stays readable."""

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
    try:
        text = problem.what if isinstance(problem, HalError) else str(problem)
    except Exception:  # noqa: BLE001 - an exception's own __str__ may be broken too
        text = "its message cannot be read"
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    said = f"{type(problem).__name__}: {line}" if line else type(problem).__name__
    if isinstance(problem, SyntaxError) and problem.filename:
        place = f", at {problem.filename}:{problem.lineno}"
    else:
        place = _place(traceback.walk_tb(problem.__traceback__), root)
    return said + place, problem.fix if isinstance(problem, HalError) else ""


def defined_at(thing: object) -> str:
    """``, at file:line`` of a function, or nothing."""
    code = getattr(inspect.unwrap(thing), "__code__", None) if callable(thing) else None
    return "" if code is None else f", at {code.co_filename}:{code.co_firstlineno}"


def _place(frames: Iterable[tuple[FrameType, int]], root: str) -> str:
    """``, at file:line`` of the innermost frame that is the plugin's own; the outermost frame comes first."""
    own = ""
    for frame, line in frames:
        name = frame.f_globals.get("__name__") or ""
        if name == root or name.startswith(f"{root}."):
            own = f", at {frame.f_code.co_filename}:{line}"
    return own


# In a child process


def ask(record: PluginRecord, deadline: float, fix: str) -> Device | Unavailable:
    """Probe one plugin in a child process of its own, in which no other plugin is loaded.

    ``fix`` is what to do where the child crashes or hangs.
    """
    job = {name: getattr(record, name) for name in ("name", "value", "dist", "version", "builtin")}
    path = [entry for entry in sys.path if isinstance(entry, str)]
    until = time.time() + deadline - min(0.5, deadline / 4)
    boot = f"import sys; sys.path[:] = {path!r}; from glm5_hal._probe_child import answer; answer({job!r}, {until!r})"
    try:
        child = subprocess.Popen(
            [sys.executable, "-c", boot],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as problem:
        return Unavailable(f"the probe's process could not be started: {told(problem)[0]}", fix)
    assert child.stdout is not None
    assert child.stderr is not None
    said, heard = bytearray(), bytearray()
    answers = threading.Thread(target=_read, args=(child.stdout, said, b"\n"), daemon=True)
    noise = threading.Thread(target=_read, args=(child.stderr, heard), daemon=True)
    try:
        answers.start()
        noise.start()
        answers.join(deadline)
        hung = answers.is_alive()
        if not hung and b"\n" not in said:
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
    finally:
        _end(child)
    noise.join(GRACE)
    found = _decoded(bytes(said))
    if found is not None:
        return found
    where, words = _last_seen(heard.decode(errors="replace"), record)
    if hung:
        return Unavailable(f"the probe did not answer within {deadline:g} s{where}", fix)
    status = child.returncode
    if status is not None and status < 0:
        return Unavailable(f"the probe died with {_signal(-status)}{where or words}", fix)
    return Unavailable(f"the probe ended its process with status {status} and without an answer{where or words}", fix)


def answer(job: dict[str, Any], until: float) -> None:
    """The child's side: load the one plugin, probe it, write one line, and leave without any library's farewell."""
    channel = os.dup(1)
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)
    faulthandler.dump_traceback_later(max(0.05, until - time.time()))
    from glm5_hal import plugins

    record = plugins.load(plugins.PluginRecord(**job), None)
    found = plugins.probe(record, None)
    if record.backend is None:
        found = Unavailable(f"the probe's process could not load the plugin: {record.reason}", record.fix)
    with os.fdopen(channel, "wb") as pipe:
        pipe.write(_encoded(found) + b"\n")
    os._exit(0)


def _encoded(found: Device | Unavailable) -> bytes:
    kind = Device if isinstance(found, Device) else Unavailable
    values = {field.name: getattr(found, field.name) for field in fields(kind)}
    if isinstance(found, Device):
        values |= {"features": sorted(found.features), "versions": dict(found.versions)}
    return json.dumps([kind.__name__, values]).encode()


def _decoded(line: bytes) -> Device | Unavailable | None:
    try:
        kind, values = json.loads(line)
        if kind == "Device":
            return Device(**(values | {"features": frozenset(values["features"])}))
        return Unavailable(**values)
    except (ValueError, TypeError, KeyError, HalError):
        return None


def _read(stream: IO[bytes], kept: bytearray, end: bytes | None = None) -> None:
    """Keep the end of what comes, until ``end`` or the end of the stream. A writer never waits for us."""
    with stream:
        while chunk := stream.read(OUTPUT_LIMIT):
            kept += chunk
            if end is not None and end in chunk:
                return
            if end is None:
                del kept[:-OUTPUT_LIMIT]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all that it started. One that sits in a driver call cannot be killed: it is left behind."""
    if child.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)


def _last_seen(text: str, record: PluginRecord) -> tuple[str, str]:
    """Where the child was by its fault handler's dump, the plugin's own files first; and its last words."""
    probe = record.backend.probe if record.backend is not None else None
    home = os.path.dirname(defined_at(probe).removeprefix(", at "))
    frames = re.findall(r'^  File "(.+)", line (\d+) in ', text, re.MULTILINE)
    own = [frame for frame in frames if os.path.dirname(frame[0]) == home] or frames
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f", at {own[0][0]}:{own[0][1]}" if own else "", f"; its last words: {lines[-1][:200]}" if lines else ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
