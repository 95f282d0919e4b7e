"""Sampled calls and the thread that judges them, with bounded memory."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glm5_hal.files import add_line

if TYPE_CHECKING:
    from glm5_hal.resolve import Choice

#: Bytes that one sampled call may hold, and that all waiting ones may hold together.
CALL_BYTES, WAITING_BYTES = 64 << 20, 256 << 20

#: Work of an oracle, in floating-point operations, that is still worth a CPU's while.
MOST_FLOPS = 5e10


@dataclass(frozen=True)
class Sampled:
    """A call to be judged: its arguments before and after, and its results, all on the CPU."""

    op: str
    choice: Choice
    args: Mapping[str, Any]
    after: Mapping[str, Any]
    returned: Any
    size: int


class Judge:
    """A thread that judges sampled calls and writes what it finds, with bounded memory.

    ``seen`` holds every (op, kernel) of which a call was sampled: the first one always is.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.seen: set[tuple[str, str]] = set()
        self._waiting: queue.Queue[Sampled] = queue.Queue()
        self._bytes, self._lock = 0, threading.Lock()
        self._thread: threading.Thread | None = None

    def before(self, op: str, choice: Choice, given: Mapping[str, Any]) -> tuple[dict[str, Any], Any] | None:
        """Copies of a call's arguments and the cache pages that they touch; None if the call is not to be judged."""
        from glm5_hal.ops import specs
        from glm5_hal.ops._common.compact import compact

        spec = specs()[op]
        try:
            args = spec.bind(**given)
            why = _unfit(spec, args)
            if why is None:
                small, pages = compact(spec, args)
                size = sum(_size(v) for v in small.values())
                if size > CALL_BYTES:
                    why = f"it holds {size >> 20} MiB, more than {CALL_BYTES >> 20}"
                elif self._bytes + size > WAITING_BYTES:
                    why = "too many sampled calls wait to be judged"
                else:
                    return {k: _copied(v) for k, v in small.items()}, pages
        except Exception as problem:  # noqa: BLE001 - shadowing must never break a call; the reason is written down
            why = f"its arguments could not be copied: {type(problem).__name__}: {problem}"
        self._write({"op": op, "kernel": choice.name, "skipped": why})
        return None

    def after(self, op: str, choice: Choice, given: Mapping[str, Any], before: Any, returned: Any) -> None:
        from glm5_hal.ops import specs

        args, pages = before
        try:
            touched = {n: given[n] for n in specs()[op].mutates if given.get(n) is not None}
            after = {n: _copied(t if pages is None else t.index_select(0, pages)) for n, t in touched.items()}
            outs = tuple(map(_copied, returned)) if isinstance(returned, tuple) else _copied(returned)
        except Exception as problem:  # noqa: BLE001 - as above
            why = f"its results could not be copied: {type(problem).__name__}: {problem}"
            self._write({"op": op, "kernel": choice.name, "skipped": why})
            return
        size = sum(_size(v) for part in (args, after) for v in part.values())
        with self._lock:
            self._bytes += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="glm5-shadow", daemon=True)
                self._thread.start()
        self._waiting.put(Sampled(op, choice, args, after, outs, size))

    def flush(self, timeout: float = 60.0) -> bool:
        """Wait until everything sampled so far is judged; False if that takes longer than ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while self._waiting.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)
        return not self._waiting.unfinished_tasks

    def _work(self) -> None:
        while True:
            call = self._waiting.get()
            try:
                self._write(judged(call))
            except Exception as problem:  # noqa: BLE001 - an oracle that fails is written down, and the next is judged
                why = f"the oracle failed: {type(problem).__name__}: {problem}"
                self._write({"op": call.op, "kernel": call.choice.name, "skipped": why})
            finally:
                with self._lock:
                    self._bytes -= call.size
                self._waiting.task_done()

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            add_line(self.file, {"time": time.time(), "pid": os.getpid(), **record})


def judged(call: Sampled) -> dict[str, Any]:
    """The record of one sampled call. ``excess`` is its largest error as a share of the budget: above 1 is too much."""
    from glm5_hal.conformance import oracle
    from glm5_hal.conformance.cases import Case
    from glm5_hal.conformance.checks.accuracy import judge
    from glm5_hal.conformance.trial import Expected, Trial
    from glm5_hal.ops import specs
    from glm5_hal.signature import Facts
    from glm5_hal.spec import Inputs, Sample

    spec = specs()[call.op]
    first = next(iter(call.args[a.name] for a in spec.args if not a.optional))
    case = Case(call.op, str(first.dtype)[6:], Sample("live", {}))
    expected = Expected(oracle.truth(spec, call.args), oracle.emulation(spec, call.args))
    kernel = call.choice.kernel
    trial = Trial(case, Inputs(dict(call.args)), kernel, kernel.fn, "cpu", expected, Facts())
    finding = judge(trial, oracle.collect(spec, call.returned, {**call.args, **call.after}))
    shares = {k: _share(finding.errors[k], finding.budget[k]) for k in finding.errors.keys() & finding.budget.keys()}
    worst = max(shares, key=lambda k: shares[k], default="")
    excess = shares.get(worst, 0.0) if finding.ok else max(shares.get(worst, 0.0), 1.0)
    return {
        "op": call.op,
        "kernel": call.choice.name,
        "ok": bool(finding.ok),
        "proves": not finding.mistrusted,
        "excess": excess if math.isfinite(excess) else "inf",
        "criterion": worst,
        "detail": finding.detail,
        "signature": _spelled(call.args),
    }


def _share(error: float, budget: float) -> float:
    return error / budget if budget > 0 else math.inf if error > 0 else 0.0


def _unfit(spec: Any, args: Mapping[str, Any]) -> str | None:
    """Why a call is not judged."""
    from glm5_hal.context import capturing
    from glm5_hal.metadata import bind_axes

    if capturing():
        return "it is being captured in a device graph"
    tensors = {n: args[n] for n in spec.tensors}
    shapes = {n: None if t is None else tuple(t.shape) for n, t in tensors.items()}
    axes = bind_axes(spec, shapes, {n: args[n] for n in spec.options})
    flops = spec.cost({**axes, "itemsize": 8, "cache_row": 0}).flops
    return f"its oracle takes {flops:.1e} operations" if flops > MOST_FLOPS else None


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if hasattr(value, "untyped_storage") else value


def _size(value: Any) -> int:
    return value.numel() * value.itemsize if hasattr(value, "untyped_storage") else 0


def _spelled(args: Mapping[str, Any]) -> str:
    shapes = (f"{n}:{str(v.dtype)[6:]}{list(v.shape)}" for n, v in args.items() if hasattr(v, "untyped_storage"))
    return " ".join([*shapes, *(f"{n}={v}" for n, v in args.items() if isinstance(v, (int, float, str)))])
