"""Shadow mode: a few live calls are computed again in float64, off the hot path, and judged as conformance judges.

``GLM5_SHADOW='topk_*:0.01'`` samples one call in a hundred of the ops that match. What a sampled call was given and
what it gave are copied (which syncs a device: that call is slower, no other is), and a thread of its own computes the
oracle on the CPU. So "the model got worse on this chip" becomes "this op, these shapes": ``glm5-hal report``.
"""

from __future__ import annotations

import atexit
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glm5_hal.shadow.judging import Judge
from glm5_hal.shadow.setting import FILE, Shadow, parse

if TYPE_CHECKING:
    from glm5_hal.resolve import Choice

__all__ = ["FILE", "Shadow", "flush", "forked", "parse", "shadowed"]


def shadowed(op: str, choice: Choice, fn: Callable[..., Any], rate: float, file: str) -> Callable[..., Any]:
    """The kernel, with a share of its calls sampled: the first one of the op on this kernel, whatever its signature,
    then each with probability ``rate``."""
    from glm5_hal.ops import specs

    spec, lots, judge = specs()[op], random.Random(), _judge_of(file)
    names, key = tuple(spec.signature.parameters), (op, choice.name)

    def sampling(*args: Any, **kwargs: Any) -> Any:
        if key in judge.seen and lots.random() >= rate:
            return fn(*args, **kwargs)
        judge.seen.add(key)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        before = judge.before(op, choice, given)
        returned = fn(*args, **kwargs)
        if before is not None:
            judge.after(op, choice, given, before, returned)
        return returned

    return sampling


class _Process:
    """This process's judges, one per file."""

    def __init__(self) -> None:
        self.judges: dict[str, Judge] = {}
        self.lock = threading.Lock()


_process = _Process()


def _judge_of(file: str) -> Judge:
    with _process.lock:
        if not _process.judges:
            atexit.register(flush)  # what was sampled is judged before the process ends
        return _process.judges.setdefault(file, Judge(file))


def flush(timeout: float = 60.0) -> bool:
    """Wait until every sampled call of this process is judged and written; False if ``timeout`` seconds are too few."""
    waited = [judge.flush(timeout) for judge in list(_process.judges.values())]
    return all(waited)


def forked() -> None:
    """For a child after a fork: the parent's threads are not there, and its waiting calls are the parent's."""
    _process.__init__()  # type: ignore[misc]
