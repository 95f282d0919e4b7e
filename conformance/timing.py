"""How long a call takes on a device, with nothing of it in a cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from glm5_hal.conformance.trial import waiting

#: Bytes that are read before every call: more than any chip's cache holds. What was written would still have to leave
#: the cache, at the call's expense.
COLD = 1 << 28

#: Calls that are timed at most.
RUNS = 200

#: How often these are read at most, so that a device is still busy when the host has handed it the whole call; and how
#: much longer that is made to take.
COVERS, MARGIN = 256, 1.5


def seconds_of(call: Callable[[], Any], device: str, budget: float) -> float:
    """Seconds of a call, of as many as fit into ``budget`` seconds, after one to warm up and one to see how many fit.

    By the device's own clock where torch has its events: what the host does while the device is busy does not count,
    launches are hidden behind other work as they are in a serving engine, and the median counts. Else, as on a CPU, by
    this machine's clock, and the fastest counts.
    """
    kind = device.split(":")[0]
    module = getattr(torch, kind)
    call()
    waiting(device)()
    if kind == "cpu" or not hasattr(module, "Event"):
        return min(_repeated(lambda runs: _by_this_clock(call, device, runs), budget))
    flush = torch.zeros(COLD // 4, dtype=torch.float32, device=device).sum
    covers = _covers(call, flush, module)
    return median(_repeated(lambda runs: _by_its_own(call, flush, covers, module, runs), budget))


def _repeated(timed: Callable[[int], list[float]], budget: float) -> list[float]:
    began = time.perf_counter()
    first = timed(1)
    runs = min(int(budget / (time.perf_counter() - began)), RUNS)
    return timed(runs) if runs > 1 else first


def _covers(call: Callable[[], Any], flush: Callable[[], Any], module: Any) -> int:
    """How often to flush the cache before a call."""
    flush()
    reading = _by_its_own(flush, flush, 1, module, 1)[0]
    began = time.perf_counter()
    call()
    handing = time.perf_counter() - began
    module.synchronize()
    return max(1, min(math.ceil(MARGIN * handing / reading), COVERS)) if reading > 0 else 1


def _by_its_own(call: Callable[[], Any], flush: Callable[[], Any], covers: int, module: Any, runs: int) -> list[float]:
    pairs = [(module.Event(enable_timing=True), module.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        for _ in range(covers):
            flush()
        start.record()
        call()
        end.record()
    module.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _by_this_clock(call: Callable[[], Any], device: str, runs: int) -> list[float]:
    times, wait = [], waiting(device)
    for _ in range(runs):
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return times
