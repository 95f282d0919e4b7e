"""Block sizes of one op: what its calls take with some, and a walk to better ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glm5_hal.backend import Device, Kernel, Tunable
from glm5_hal.decision import Rejected
from glm5_hal.spec import declared

if TYPE_CHECKING:
    from glm5_hal.conformance.workloads import Args, Workload

#: What a size must save to be taken: less is noise.
WORTH = 0.02

#: How far a result may be from that of the sizes in force, of its norm or of its elements: more is not rounding.
APART = 0.01

Blocks = Mapping[str, int]

#: Seconds of an op's calls with such sizes, or why they cannot be used.
Measure = Callable[[Blocks], float | str]

#: Seconds of a call on a device, within a time budget.
Timer = Callable[[Callable[[], Any], str, float], float]


@dataclass
class Search:
    """What was found for one op. Times are the geometric mean over its calls; ``passed_over`` says why, by sizes;
    ``skipped``, why the op was not searched."""

    op: str
    before: Blocks
    seconds_before: float = 0.0
    after: Blocks = field(default_factory=dict)
    seconds: float = 0.0
    tried: int = 0
    calls: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    skipped: str = ""

    @property
    def gain(self) -> float:
        return self.seconds_before / self.seconds if self.seconds else 1.0


def search(
    op: str, before: Blocks, tunable: Tunable, device: Device, calls: Sequence[Workload], timer: Timer, seconds: float
) -> Search:
    """Walk from the sizes in force to better ones. A choice that fails, or that computes something else, is passed
    over."""
    found = Search(op, dict(before))
    bench = Bench(tunable, device, op, timer, seconds)
    with torch.inference_mode():
        found.calls = [made for call in calls if (made := bench.add(call, before))]
        if not found.calls:
            found.skipped = bench.refusal or "no call of it is known"
            return found

        def measure(sizes: Blocks) -> float | str:
            taken = bench.measure(sizes)
            found.tried += 1
            if isinstance(taken, str):
                found.passed_over[", ".join(f"{name}={size}" for name, size in sizes.items())] = taken
            elif sizes == before:
                found.seconds_before = taken
            return taken

        found.after, least = descend(before, tunable.candidates(op, before), measure)
    if math.isinf(least):
        found.skipped = f"with the sizes in force: {next(iter(found.passed_over.values()))}"
    else:
        found.seconds = least
    return found


def descend(
    start: Blocks, candidates: Mapping[str, Sequence[int]], measure: Measure, worth: float = WORTH
) -> tuple[Blocks, float]:
    """The best sizes that are reached from ``start`` by changing one at a time, until no change is worth it."""
    best = dict(start)
    known: dict[tuple[tuple[str, int], ...], float] = {}

    def taken(sizes: Blocks) -> float:
        key = tuple(sorted(sizes.items()))
        if key not in known:
            found = measure(sizes)
            known[key] = math.inf if isinstance(found, str) else found
        return known[key]

    least, better = taken(best), True
    while better and least < math.inf:
        better = False
        for name, values in candidates.items():
            times = {value: taken({**best, name: value}) for value in values if value != best[name]}
            value = min(times, key=lambda v: times[v], default=best[name])
            if times and times[value] < least * (1 - worth):
                best[name], least, better = value, times[value], True
    return best, least


class Bench:
    """The calls of one op, made once, and what they gave with the sizes in force."""

    def __init__(self, tunable: Tunable, device: Device, op: str, timer: Timer, seconds: float) -> None:
        self._tunable, self._device, self._op = tunable, device, op
        self._timer, self._seconds = timer, seconds
        self._made: list[tuple[Args, tuple[Tensor, ...]]] = []
        self.refusal = ""

    def add(self, call: Workload, sizes: Blocks) -> str:
        """Make a call's arguments and learn what the sizes in force give; its name, or "" with a `refusal`."""
        self.refusal = "no call of it fits the device's memory"
        with suppress(torch.OutOfMemoryError, MemoryError):
            kernel, args = self._kernel(sizes), call.make(self._device.type)
            if self._refused(kernel, args):
                return ""
            self._made.append((args, self._outcome(kernel, args)))
            return f"{call.shape} {call.cache_format}".strip()
        return ""

    def measure(self, sizes: Blocks) -> float | str:
        """The geometric mean of the calls' seconds, or why these sizes cannot be used."""
        logs = 0.0
        try:
            kernel = self._kernel(sizes)
            for args, expected in self._made:
                if not alike(self._outcome(kernel, args), expected):
                    return "it computes something else"
                logs += math.log(self._timer(partial(kernel.fn, **args), self._device.type, self._seconds))
        except Exception as problem:  # noqa: BLE001 - too large for the chip, in whatever words its compiler has
            return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        return math.exp(logs / len(self._made))

    def _kernel(self, sizes: Blocks) -> Kernel:
        """The op's first: others are for those who ask for them."""
        return next(k for k in self._tunable.kernels(self._device.arch, {self._op: sizes}) if k.op == self._op)

    def _refused(self, kernel: Kernel, args: Args) -> bool:
        from glm5_hal import ops

        call = getattr(ops, self._op).describe(**args)
        answers = (requirement.test(call, self._device.facts) for requirement in kernel.requires)
        self.refusal = next((answer.detail for answer in answers if isinstance(answer, Rejected)), "")
        return bool(self.refusal)

    def _outcome(self, kernel: Kernel, args: Args) -> tuple[Tensor, ...]:
        """What a call returns, and copies of what it writes."""
        returned = kernel.fn(**args)
        outs = returned if isinstance(returned, tuple) else (returned,)
        written = [args[name].clone() for name in declared(self._op).mutates if args[name] is not None]
        return (*(out for out in outs if out is not None), *written)


def alike(given: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two results differ by rounding at most. What is chosen may differ where scores are nearly equal."""
    return len(given) == len(expected) and all(map(_close, given, expected))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        finite = b.isfinite()
        if not bool((a.isfinite() == finite).all()):
            return False
        a, b = (t.float().masked_fill(~finite, 0.0) for t in (a, b))
        return bool((a - b).norm() <= APART * b.norm())
    if a.dtype == torch.int32 and a.dim() == 2:  # indices, in rows
        rows = zip(a[:4].tolist(), b[:4].tolist(), strict=True)
        return all(len(set(x) ^ set(y)) <= 2 * APART * len(y) for x, y in rows)
    return int((a != b).sum()) <= APART * a.numel()
