"""How long a call takes on a device, with nothing of it in a cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from glm5_hal.conformance.trial import waiting

#: Bytes that are written before every call: more than any chip's cache holds, and enough work to hide the launch.
COLD = 1 << 28

#: Calls that are timed at most.
RUNS = 200


def seconds_of(call: Callable[[], Any], device: str, budget: float) -> float:
    """Seconds of a call, of as many as fit into ``budget`` seconds, after one to warm up and one to see how many fit.

    By the device's own clock where torch has its events: what the host does while the device is busy does not count,
    and the median does. Else, as on a CPU, by this machine's, and the fastest counts.
    """
    kind = device.split(":")[0]
    own = kind != "cpu" and hasattr(getattr(torch, kind), "Event")
    timed, chosen = (_by_its_own, median) if own else (_by_this_clock, min)
    call()
    waiting(device)()
    began = time.perf_counter()
    first = timed(call, device, 1)
    runs = min(int(budget / (time.perf_counter() - began)), RUNS)
    return chosen(timed(call, device, runs) if runs > 1 else first)


def _by_its_own(call: Callable[[], Any], device: str, runs: int) -> list[float]:
    module: Any = getattr(torch, device.split(":")[0])
    cold = torch.empty(COLD, dtype=torch.uint8, device=device)
    pairs = [(module.Event(enable_timing=True), module.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        cold.zero_()
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
