"""The process between the runner and a worker: it starts the worker, tells how it ended, and leaves nothing behind.

The runner starts a guardian as a fresh interpreter; the guardian forks before anything heavy is imported, so that no
device runtime is ever forked. The worker has a session of its own: signals to its group, and a Ctrl-C in the terminal,
stay there. Whatever becomes of the runner, its end of the lifeline closes, and the guardian kills the worker with all
that the worker started. If the guardian itself is killed, the operating system kills the worker (Linux).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

#: Seconds that the worker's own children have to be gone.
GRACE = 1.0


def guard(channel: int, lifeline: int, report: int, serve: str, job: dict[str, Any]) -> None:
    """The first process's whole life: fork the worker, wait for its end, report it.

    ``serve`` is "module:function", which the worker calls with ``channel`` and ``job``.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the worker leaves behind becomes ours
    guardian = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(lifeline)
        os.close(report)
        if os.getppid() != guardian:
            os._exit(1)
        _work(channel, serve, job)
    os.close(channel)
    with suppress(OSError):
        os.write(report, f"{pid}\n".encode())
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    reaped = threading.Event()
    threading.Thread(target=_watch, args=(lifeline, pid, reaped), daemon=True).start()
    _, status, usage = os.wait4(pid, 0)
    reaped.set()
    _clear(pid)
    with suppress(OSError):
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        os.write(report, json.dumps({"status": os.waitstatus_to_exitcode(status), "peak": peak}).encode())
    os._exit(0)


def _work(channel: int, serve: str, job: dict[str, Any]) -> None:
    """The worker's whole life. It ends without any library's farewell."""
    import importlib
    import traceback

    code = 1
    try:
        module, _, function = serve.partition(":")
        getattr(importlib.import_module(module), function)(channel, job)
        code = 0
    except BaseException:  # noqa: BLE001 - nothing of the worker may return into the guardian's code
        with suppress(Exception):
            traceback.print_exc()
    finally:
        os._exit(code)


def _watch(lifeline: int, pid: int, reaped: threading.Event) -> None:
    while os.read(lifeline, 1):
        pass
    if not reaped.is_set():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _clear(pid: int) -> None:
    """Kill the worker's group, then whatever left that group and was handed to us."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    end = time.monotonic() + GRACE
    with suppress(ChildProcessError):  # no child is left
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                for child in _children():
                    with suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                time.sleep(0.01)


def _children() -> list[int]:
    """Our children (Linux; elsewhere only the worker's group is known)."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        with suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{int(name)}/stat", encoding="utf-8", errors="replace") as stat:
                parent = stat.read().rpartition(")")[2].split()[1]
            found += [int(name)] if int(parent) == os.getpid() else []
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
