"""What ran, and how often: selection events, counters and profiler ranges, all off the hot path.

Nothing here costs a call unless it is switched on: observing wraps the kernels that the dispatch tables hold, and
switching it on or off clears those tables.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glm5_hal import context
from glm5_hal.files import add_line
from glm5_hal.resolve import Choice
from glm5_hal.shadow import Shadow, parse, shadowed
from glm5_hal.signature import Signature

log = logging.getLogger("glm5_hal")
log.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Observing:
    counters: bool = False
    profile: bool = False
    shadow: Shadow | None = None


class _State:
    def __init__(self) -> None:
        self.observing = Observing()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.seconds: dict[tuple[str, str], float] = {}
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()


_state = _State()


def watch(*, counters: bool = False, profile: bool = False, shadow: str | None = None) -> None:
    """Switch observing on or off, for every call from now on (bound kernels excepted: they are bare).

    Args:
        counters: count calls and host seconds per (op, backend:provider), read with :func:`counts`.
        profile: give each call a torch.profiler range named ``glm5::op[backend:provider]``.
        shadow: what GLM5_SHADOW may say ("topk_*:0.01"), which it takes the place of; None leaves that in force.
    """
    _state.observing = Observing(counters, profile, None if shadow is None else parse(shadow, "watch"))
    dispatch = sys.modules.get("glm5_hal.dispatch")
    if dispatch is not None:
        dispatch.clear_tables()


def counts() -> dict[str, dict[str, Any]]:
    """Calls, host seconds and fallback selections per ``op[backend:provider]``, most calls first."""
    with _state.lock:
        called = [key for key, _ in _state.calls.most_common()]
        return {
            f"{op}[{kernel}]": {
                "calls": _state.calls[op, kernel],
                "seconds": _state.seconds.get((op, kernel), 0.0),
                "fallback": _state.fallbacks[op, kernel] > 0,
            }
            for op, kernel in called + sorted(_state.fallbacks.keys() - set(called))
        }


def renew_locks() -> None:
    """For a child after a fork: a lock that another thread of the parent held is never released there."""
    _state.lock = threading.Lock()


def clear_counts() -> None:
    with _state.lock:
        _state.calls.clear()
        _state.seconds.clear()
        _state.fallbacks.clear()


def wrapped(op: str, choice: Choice, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, with whatever observing is on around it."""
    observing, name = _state.observing, choice.name
    sampling = observing.shadow or context.settings().shadow
    if rate := sampling.rate(op):
        fn = shadowed(op, choice, fn, rate, sampling.file)
    if observing.profile:
        fn = _ranged(fn, f"glm5::{op}[{name}]")
    if observing.counters:
        fn = _counted(fn, (op, name))
    return fn


def _ranged(fn: Callable[..., Any], label: str) -> Callable[..., Any]:
    import torch

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(label):
            return fn(*args, **kwargs)

    return ranged


def _counted(fn: Callable[..., Any], key: tuple[str, str]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return fn(*args, **kwargs)
        finally:
            spent = time.perf_counter() - start
            with _state.lock:
                _state.calls[key] += 1
                _state.seconds[key] = _state.seconds.get(key, 0.0) + spent

    return counted


def selected(op: str, call: Signature, choice: Choice) -> None:
    """A table entry was made: say so where GLM5_LOG asks for it. A fallback that the policy lists warns once."""
    if choice.fallback:
        key = (op, choice.name)
        with _state.lock:
            first = key not in _state.fallbacks
            _state.fallbacks[key] += 1
        if first:
            log.warning("fallback: %s is served by %s, which is not the first backend in the policy", op, choice.name)
        emit("hal.fallback", {"op": op, "kernel": choice.name})
    emit("hal.select", {"op": op, "kernel": choice.name, "signature": _spelled(call)})


def emit(event: str, fields: Mapping[str, Any]) -> None:
    """One event to the log that GLM5_LOG names: a line for people, or a JSON line for programs."""
    setting = context.settings().log
    if setting.level == "off":
        return
    if setting.level == "jsonl":
        with _state.lock:
            add_line(setting.path, {"event": event, "time": time.time(), **fields})
        return
    text = "  ".join(f"{k}={v}" for k, v in fields.items())
    what = (str(fields.get("op")), str(fields.get("kernel")))
    if setting.level == "debug" or event != "hal.select" or what not in _announced:
        _announced.add(what)
        print(f"glm5_hal {event}  {text}", file=sys.stderr)  # noqa: T201 - the user asked for it with GLM5_LOG


_announced: set[tuple[str, str]] = set()


def _spelled(call: Signature) -> str:
    tensors = (f"{n}:{m.dtype}{list(m.shape)}" for n, m in call.tensors.items() if m is not None)
    scalars = (f"{n}={v}" for n, v in call.scalars.items())
    return " ".join([*tensors, *scalars])
