"""A probe in a child process: both ends of it.

The answer is one line of JSON on the child's first stdout; whatever the plugin prints goes to stderr.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import fields
from typing import IO, Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.errors import HalError
from glm5_hal.plugins.isolation import OUTPUT_LIMIT, defined_at, told
from glm5_hal.plugins.loading import load
from glm5_hal.plugins.probing import PROBE_DEADLINE, hardware_fix, probe
from glm5_hal.plugins.record import PluginRecord

#: Seconds that a child may take to be gone once it has answered or was killed.
GRACE = 2.0


def probe_in_subprocess(record: PluginRecord, deadline: float = PROBE_DEADLINE) -> Device | Unavailable:
    """What `probe` finds, from a child process, so that a crash or a driver that never returns costs that child alone.

    No other plugin is loaded there. ``deadline`` covers all of it, the start of the interpreter included.
    """
    if record.backend is None:
        return Unavailable(record.reason, record.fix, fault=True)

    def broken(reason: str) -> Unavailable:
        return Unavailable(reason, hardware_fix(record), fault=True)

    job = {name: getattr(record, name) for name in ("name", "value", "dist", "version", "builtin", "given")}
    path = [entry for entry in sys.path if isinstance(entry, str)]
    until = time.time() + deadline - min(0.5, deadline / 4)
    boot = f"import sys; sys.path[:] = {path!r}; from {__name__} import answer; answer({job!r}, {until!r})"
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
        return broken(f"the probe's process could not be started: {told(problem)[0]}")
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
    found = _answered(bytes(said))
    if found is not None:
        return found
    where, words = _last_seen(heard.decode(errors="replace"), record)
    if hung:
        return broken(f"the probe did not answer within {deadline:g} s{where}")
    status = child.returncode
    if status is not None and status < 0:
        return broken(f"the probe died with {_signal(-status)}{where or words}")
    return broken(f"the probe ended its process with status {status} and without an answer{where or words}")


def answer(job: dict[str, Any], until: float) -> None:
    """The child's side: load the one plugin, probe it, write one line, and leave without any library's farewell."""
    channel = os.dup(1)
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)
    faulthandler.dump_traceback_later(max(0.05, until - time.time()))
    record = load(PluginRecord(**job), None)
    found = probe(record, None)
    if record.backend is None:
        found = Unavailable(f"the probe's process could not load the plugin: {record.reason}", record.fix, fault=True)
    with os.fdopen(channel, "wb") as pipe:
        pipe.write(json.dumps(encoded(found)).encode() + b"\n")
    os._exit(0)


def encoded(found: Device | Unavailable) -> list[Any]:
    """As JSON can hold it."""
    kind = Device if isinstance(found, Device) else Unavailable
    values = {field.name: getattr(found, field.name) for field in fields(kind)}
    if isinstance(found, Device):
        values |= {"features": sorted(found.features), "versions": dict(found.versions)}
    return [kind.__name__, values]


def decoded(found: Any) -> Device | Unavailable:
    """The inverse of `encoded`. Raises ValueError, TypeError, KeyError or HalError for anything else."""
    kind, values = found
    if kind == "Device":
        return Device(**(values | {"features": frozenset(values["features"])}))
    return Unavailable(**values)


def _answered(line: bytes) -> Device | Unavailable | None:
    try:
        return decoded(json.loads(line))
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
