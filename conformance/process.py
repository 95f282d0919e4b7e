"""Processes in which kernels run. A worker as the runner sees it: started, listened to, killed, and how it ended; and
this one, where it has no workers: what kernels print in it."""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm5_hal.conformance.wire import Channel

#: Seconds that a killed worker has to be gone. One that sits in a driver call cannot be killed: it is left behind.
GRACE = 5.0

#: How much of what a worker prints is kept, in bytes, and how much of it a result shows, in lines.
LOG_BYTES, LOG_LINES = 65536, 30

#: What a worker runs, as module:function.
SERVE = "glm5_hal.conformance.worker:serve"

_NO_MEMORY = re.compile(r"std::bad_alloc|MemoryError|[Oo]ut of memory|[Cc]annot allocate memory")


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        status: as in subprocess, None if it could not be learnt.
        log: its last lines.
        cause: why we ended it, where that is its own doing.
        no_memory: it was killed for want of memory, or says so itself.
        late: it did not end in time.
    """

    status: int | None
    log: str
    cause: str = ""
    no_memory: bool = False
    late: bool = False

    @property
    def verdict(self) -> tuple[str, str, str]:
        """Verdict, code and detail of the kernel that ran in it."""
        if self.cause:
            return "CRASH", "PROTOCOL", self.cause
        if self.no_memory:
            return "OOM", self._signal, f"out of memory: the process ended with {self._end}"
        return "CRASH", self._signal, f"the process ended with {self._end}{self._place}"

    @property
    def _signal(self) -> str:
        if self.status is None or self.status >= 0:
            return "EXIT"
        with suppress(ValueError):
            return signal.Signals(-self.status).name
        return f"SIGNAL{-self.status}"

    @property
    def _end(self) -> str:
        return f"status {self.status} and without an answer" if self._signal == "EXIT" else self._signal

    @property
    def _place(self) -> str:
        return place(self.log)


def place(log: str) -> str:
    """``, at file:line`` of the innermost frame of a fault handler's dump that is not Python's own, or nothing."""
    frames = re.findall(r'^  File "(.+)", line (\d+) in ', log, re.MULTILINE)
    library = os.path.dirname(os.__file__)
    own = [f for f in frames if not f[0].startswith(library) or "-packages" in f[0]] or frames
    return f", at {own[0][0]}:{own[0][1]}" if own else ""


def tidied(text: str) -> str:
    """The last lines, without the suite's own frames in a fault handler's dump."""
    lines, ours = [], False
    for line in text.splitlines():
        ours = line.startswith('  File "') and (ours or line.startswith('  File "<glm5_hal op'))
        if line.strip() and not ours and not line.startswith("Extension modules: "):
            lines.append(line)
    return "\n".join(lines[-LOG_LINES:])


class Process:
    """A guardian and its worker (`glm5_hal.conformance.guardian`), and our ends of their pipes."""

    def __init__(self, job: Mapping[str, Any], serve: str = SERVE) -> None:
        self._marker = f"\x1e{secrets.token_hex(8)}"
        ours, theirs = socket.socketpair()
        life_end, self._lifeline = os.pipe()
        self._report, report_end = os.pipe()
        self._output, output_end = os.pipe()
        path = [entry for entry in sys.path if isinstance(entry, str)]
        fds = theirs.fileno(), life_end, report_end
        boot = f"import sys; sys.path[:] = {path!r}; from glm5_hal.conformance.guardian import guard; "
        boot += f"guard(*{fds!r}, {serve!r}, {dict(job, marker=self._marker)!r})"
        self._kills = oom_kills()
        self.guardian = subprocess.Popen(
            [sys.executable, "-u", "-c", boot],
            stdin=subprocess.DEVNULL,
            stdout=output_end,
            stderr=output_end,
            pass_fds=fds,
            start_new_session=True,
        )
        for end in (life_end, report_end, output_end):
            os.close(end)
        theirs.close()
        self.channel, self._log = Channel(ours), bytearray()
        os.set_blocking(self._output, False)
        os.set_blocking(self._report, False)
        self._said, self._gone = b"", 0.0

    @property
    def fds(self) -> tuple[int, ...]:
        return self.channel.socket.fileno(), self._report, self._output

    @property
    def closing(self) -> bool:
        """It has closed its channel, and the report of its end has not come yet."""
        return self._gone > 0

    def send(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError):  # it is gone: the next look at it says how
            self.channel.send(message)

    def look(self) -> tuple[list[dict[str, Any]], Ending | None]:
        """What it has said since, and its end if that has come."""
        self._hear()
        messages, is_open, garbage = self.channel.waiting()
        if garbage:
            return messages, self.end(f"the worker sent {garbage}")
        said = self._reported()
        if said is None and not is_open:
            # Nobody but its end should close the channel; the report of that end comes a moment later.
            self._gone = self._gone or time.monotonic()
            if time.monotonic() - self._gone > GRACE:
                return messages, self.end("the worker closed its channel to the runner")
            time.sleep(0.01)
        return messages, None if said is None else self._closed(said)

    def end(self, cause: str = "") -> Ending:
        """Kill it with all that it started."""
        os.close(self._lifeline)
        self._lifeline = -1
        until = time.monotonic() + GRACE
        while (said := self._reported()) is None and time.monotonic() < until:
            self._hear()
            time.sleep(0.01)
        return self._closed(said or {}, cause)

    def _closed(self, said: Mapping[str, Any], cause: str = "") -> Ending:
        if self._lifeline >= 0:
            os.close(self._lifeline)
        if not said:  # the guardian is stuck, or was killed itself
            self.guardian.kill()
            worker = int(self._said.partition(b"\n")[0] or 0)
            for group in filter(None, (worker, self.guardian.pid)):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(group, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.guardian.wait(GRACE)
        self._hear()
        status = said.get("status", self.guardian.returncode)
        log = self.log()
        killed = status == -signal.SIGKILL and not cause
        starved = killed and (oom_kills() > self._kills or int(said.get("peak", 0)) > 0.8 * memory()[0])
        for fd in (self._report, self._output):
            os.close(fd)
        self.channel.socket.close()
        return Ending(status, log, cause, starved or (status != 0 and bool(_NO_MEMORY.search(log))))

    def log(self) -> str:
        """The last lines since the kernel in hand was begun."""
        return tidied(self._log.decode(errors="replace").rpartition(f"{self._marker}\n")[2])

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(64):
                chunk = os.read(self._output, 65536)
                if not chunk:
                    break
                self._log += chunk
                del self._log[:-LOG_BYTES]

    def _reported(self) -> dict[str, Any] | None:
        """The guardian's report of the end: its second line, after the worker's pid. Empty if it left none."""
        with suppress(BlockingIOError):
            while chunk := os.read(self._report, 4096):
                self._said += chunk
            return dict(json.loads(self._said.partition(b"\n")[2] or b"{}"))
        return None


def oom_kills() -> int:
    """How many processes the operating system has killed for want of memory, where it says so."""
    total = 0
    for source in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with suppress(OSError, ValueError):
            counts = dict(line.split() for line in Path(source).read_text(encoding="ascii").splitlines())
            total += int(counts.get("oom_kill", 0))
    return total


def memory() -> tuple[int, int]:
    """Bytes of memory that this machine (or this container) has, and how many of them are free for use. (2**63, 2**63)
    where that cannot be learnt."""
    total = free = 2**63
    with suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
        total, free = found["MemTotal"], found["MemAvailable"]
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


@contextmanager
def kernels_print_to_stderr() -> Iterator[None]:
    """What kernels and their SDKs print, from C too, goes to stderr: stdout holds the report, which programs read."""
    sys.stdout.flush()
    with redirect_stdout(sys.stderr):
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            with suppress(OSError, AttributeError):  # a C library whose buffers cannot be reached this way
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
