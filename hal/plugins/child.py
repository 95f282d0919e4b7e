"""One plugin in a child process: loaded, probed, its kernels tried. Whatever it does there costs that child alone.

Both ends. The child answers with one line of JSON per stage on its first stdout; whatever the plugin prints goes to
stderr. A stage that crashed or hung is the one whose line is missing.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import PurePath
from typing import IO, Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.errors import HalError
from glm5_hal.plugins.isolation import OUTPUT_LIMIT, told
from glm5_hal.plugins.loading import load
from glm5_hal.plugins.probing import PROBE_DEADLINE, hardware_fix, probe
from glm5_hal.plugins.record import TRIAL, Defect, PluginRecord

#: Seconds that a child may take to be gone once it has answered or was killed.
GRACE = 2.0

#: Seconds that the last stage has: torch and the kernels' compiler are imported there.
KERNEL_DEADLINE = 30.0

STAGES = ("load", "probe", "kernel")

#: What a child tells of a record that it loaded.
_TOLD = ("status", "code", "reason", "fix", "output", "device_type", "communicator", "smi")


@dataclass(frozen=True)
class Checkup:
    """What a child found out. A stage that was not reached has no answer: None, or "" for the kernel.

    Attributes:
        record: without its backend, which lives in the child; a plugin that needed no child is loaded here.
        found: what the probe answered.
        kernel: what a tiny kernel gave.
        providers: of its kernels, where these were asked for and given.
        ended: what ended or hung the child, if anything did: a reason not to do the same in this process. A plugin that
            is broken in an orderly way, or a probe that raises, is none.
    """

    record: PluginRecord
    found: Device | Unavailable | None = None
    kernel: str = ""
    ended: str = ""
    providers: tuple[str, ...] | None = None


def check_up(record: PluginRecord, deadline: float = PROBE_DEADLINE, last: str = "kernel") -> Checkup:
    """Load a plugin, probe it and try a kernel in a child process, up to the stage ``last``. No other is loaded there.

    ``deadline`` covers loading and probing, the start of the interpreter included; the kernel has its own.
    """
    if needs_no_child(record, last):
        return Checkup(load(record, None))
    bare = replace(record, backend=None)
    try:
        child = _start(bare, deadline, last)
    except OSError as problem:
        reason = f"a process to try it in could not be started: {told(problem)[0]}"
        return Checkup(bare.failed(Defect("CRASH", reason, bare.remedy)), ended=reason)
    answers: dict[str, Any] = {}
    line: bytes | None
    with _ended(child) as (lines, heard):
        until, line, stage = time.monotonic() + deadline, None, STAGES[0]
        for stage in STAGES[: STAGES.index(last) + 1]:
            if stage == "kernel":
                until = time.monotonic() + KERNEL_DEADLINE
            line = _answer_to(stage, lines, until, answers)
            if not line or answers["load"]["status"] != "ok" or isinstance(answers.get("probe"), Unavailable):
                break
        if line is None:  # it left without an answer: let it end by itself, so that its status is its own
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
    if stage in answers:
        return _told(bare, answers)
    limit = KERNEL_DEADLINE if stage == "kernel" else deadline
    return _told(bare, answers, stage, _end_of(child, bytes(heard), bare, None if line is None else limit))


def needs_no_child(record: PluginRecord, last: str) -> bool:
    return record.status != "ok" or (last == "load" and (record.builtin or record.backend is not None))


def _told(record: PluginRecord, answers: dict[str, Any], stage: str = "", end: str = "") -> Checkup:
    """The checkup that the answers make; ``end`` is how the child ended in a stage that it did not answer."""
    record = replace(record, **answers.get("load", {}))
    if stage == "load":
        code, ended = "TIMEOUT" if end.startswith("did not") else "CRASH", f"importing {record.value!r} {end}"
        fix = f"import the vendor's SDK in probe() only; {record.remedy}"
        return Checkup(record.failed(Defect(code, ended, fix)), ended=ended)
    if stage == "probe":
        ended = f"the probe {end}"
        return Checkup(record, Unavailable(ended, hardware_fix(record), fault=True), ended=ended)
    if stage == "kernel":
        ended = f"the kernel {end}"
        return Checkup(record, answers["probe"], f"failed: {ended}", ended)
    # The child tells of one crash itself: that its own pipes were closed.
    ended = record.reason if record.code == "CRASH" else ""
    said, providers = answers.get("kernel", ("", None))
    return Checkup(record, answers.get("probe"), said, ended, providers)


# --- the parent's side -----------------------------------------------------------------------------------------------


def _start(record: PluginRecord, deadline: float, last: str) -> subprocess.Popen[bytes]:
    path = [entry for entry in sys.path if isinstance(entry, str)]
    until = time.time() + deadline - min(0.5, deadline / 4)
    told_it = f"{record.job!r}, {until!r}, {last!r}"
    boot = f"import sys; sys.path[:] = {path!r}; from {__name__} import answer; answer({told_it})"
    return subprocess.Popen(
        [sys.executable, "-c", boot],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
        env={**os.environ, TRIAL: "1"},
    )


@contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[tuple[queue.SimpleQueue[bytes | None], bytearray]]:
    """The lines that the child answers with (None at their end) and the end of what it prints; then its end."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    heard = bytearray()
    assert child.stdout is not None
    assert child.stderr is not None
    readers = [
        threading.Thread(target=_pass_on, args=(child.stdout, lines), daemon=True),
        threading.Thread(target=_keep, args=(child.stderr, heard), daemon=True),
    ]
    try:
        for reader in readers:
            reader.start()
        yield lines, heard
    finally:
        _end(child)
        readers[1].join(GRACE)


def _pass_on(stream: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    rest = b""
    with stream, suppress(OSError, ValueError):
        while chunk := stream.read(OUTPUT_LIMIT):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                lines.put(line)
    lines.put(None)


def _keep(stream: IO[bytes], kept: bytearray) -> None:
    """Keep the end of what comes. A writer never waits for us."""
    with stream, suppress(OSError, ValueError):
        while chunk := stream.read(OUTPUT_LIMIT):
            kept += chunk
            del kept[:-OUTPUT_LIMIT]


def _answer_to(
    stage: str, lines: queue.SimpleQueue[bytes | None], until: float, answers: dict[str, Any]
) -> bytes | None:
    """Wait for one stage's line and take it down: it, None where the pipe ended, b"" where time did. Any other line
    came from a plugin that found the pipe."""
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return b""
        if line is None or _understood(line, stage, answers):
            return line


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all that it started. One that sits in a driver call cannot be killed: it is left behind."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)


def _end_of(child: subprocess.Popen[bytes], heard: bytes, record: PluginRecord, limit: float | None) -> str:
    """How a child ended without its answer, where it was, and its last words."""
    where, words = _last_seen(heard.decode(errors="replace"), record)
    if limit is not None:
        return f"did not answer within {limit:g} s{where}"
    status = child.returncode
    if status is not None and status < 0:
        return f"died with {signal_name(-status)}{where or words}"
    return f"ended its process with status {status} and without an answer{where or words}"


def _last_seen(text: str, record: PluginRecord) -> tuple[str, str]:
    """Where the child was by its fault handler's dump, the plugin's own files first; and its last words."""
    frames = re.findall(r'^  File "(.+)", line (\d+) in ', text, re.MULTILINE)
    own = [f for f in frames if record.root.partition(".")[0] in PurePath(f[0]).with_suffix("").parts] or frames
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f", at {own[0][0]}:{own[0][1]}" if own else "", f"; its last words: {lines[-1][:200]}" if lines else ""


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _understood(line: bytes, stage: str, answers: dict[str, Any]) -> bool:
    """Take one stage's answer down. What is none came from the plugin, which found the pipe."""
    try:
        name, said = json.loads(line)
        if name != stage:
            return False
        if stage == "load":
            said = {key: said[key] for key in _TOLD} | {"smi": tuple(said["smi"])}
        if stage == "probe":
            said = decoded(said)
        if stage == "kernel":
            text, offered = said
            said = str(text), None if offered is None else tuple(map(str, offered))
        answers[stage] = said
    except (ValueError, TypeError, KeyError, HalError):
        return False
    return True


# --- the child's side ------------------------------------------------------------------------------------------------


def answer(job: dict[str, Any], until: float, last: str) -> None:
    """Stage by stage, one line each; then leave without any library's farewell."""
    channel = os.dup(1)
    os.dup2(2, 1)
    faulthandler.enable(all_threads=False)
    _expire(until - time.time())
    record = load(PluginRecord(**job), None)
    if record.status == "ok" and not (_is_open(1) and _is_open(2)):
        record = record.failed(Defect("CRASH", f"importing {record.value!r} closed stdout or stderr", record.remedy))
    _say(channel, "load", {key: getattr(record, key) for key in _TOLD})
    if record.backend is None or last == "load":
        os._exit(0)
    found = probe(record, None)
    _say(channel, "probe", encoded(found))
    if isinstance(found, Unavailable) or last == "probe":
        os._exit(0)
    _expire(KERNEL_DEADLINE - 0.5)
    from glm5_hal.autoload import import_torch
    from glm5_hal.trial import tiny_kernel

    try:
        import_torch()
    except HalError as problem:
        _say(channel, "kernel", (f"failed: {problem.what}; {problem.fix}", None))
        os._exit(0)
    said = tiny_kernel(record)
    _say(channel, "kernel", (said, None if said.startswith("failed") else _providers(record)))
    os._exit(0)


def _providers(record: PluginRecord) -> tuple[str, ...] | None:
    """Of kernels that were loaded once already, without a complaint."""
    from glm5_hal.catalogue import Catalogue

    return Catalogue((record,)).providers(record.name)


def _expire(seconds: float) -> None:
    """Say where this process is when its time is up; and leave soon after, should its parent be gone by then."""
    faulthandler.dump_traceback_later(max(0.05, seconds))
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(max(1, math.ceil(seconds + 2 * GRACE)))


def _say(channel: int, stage: str, said: object) -> None:
    rest = json.dumps([stage, said]).encode() + b"\n"
    while rest:
        rest = rest[os.write(channel, rest) :]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def encoded(found: Device | Unavailable) -> tuple[str, dict[str, Any]]:
    """As JSON can hold it."""
    kind = Device if isinstance(found, Device) else Unavailable
    values = {field.name: getattr(found, field.name) for field in fields(kind)}
    if isinstance(found, Device):
        values |= {"features": sorted(found.features), "versions": dict(found.versions)}
    return kind.__name__, values


def decoded(found: Any) -> Device | Unavailable:
    """The inverse of `encoded`. Raises ValueError, TypeError, KeyError or HalError for anything else."""
    kind, values = found
    if kind == "Device":
        return Device(**(values | {"features": frozenset(values["features"])}))
    return Unavailable(**values)
