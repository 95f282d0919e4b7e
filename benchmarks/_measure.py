"""What the benchmarks share: the time of calls that take turns, this machine's rates, and how far a call pushes memory.

They are run as programs, which puts this folder on the path: ``from _measure import least``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], Any]

#: Rows and columns of the matrices that are multiplied, and numbers that are read, to learn the machine's rates.
MATRIX, NUMBERS = 1536, 1 << 26


def least(calls: Mapping[str, Call], repeat: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds per call, the least of several, the calls taking turns; and what each returned when it warmed up."""
    made = {name: call() for name, call in calls.items()}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeat):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best, made


def rates(repeat: int) -> dict[str, float]:
    """This machine's: multiply-adds of torch's own large matrix product, counted twice, and bytes read."""
    import torch

    def seconds(call: Call) -> float:
        return least({"call": call}, repeat)[0]["call"]

    found = {}
    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(MATRIX, MATRIX).to(getattr(torch, name)) for _ in range(2))
        found[f"{name} GFLOP/s"] = 2 * MATRIX**3 / seconds(lambda a=a, b=b: a @ b) / 1e9
    found["read GB/s"] = NUMBERS * 4 / seconds(torch.ones(NUMBERS).sum) / 1e9
    return found


def grown(call: Call) -> tuple[int, Any, str]:
    """Bytes of peak resident memory during a call over what was resident before it, what it returned, and how it was
    read."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and kept would hide growth
    if _reset_peak():
        before = _status("VmRSS")
        made = call()
        return max(_status("VmHWM") - before, 0), made, "VmHWM"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, made, "ru_maxrss"


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
