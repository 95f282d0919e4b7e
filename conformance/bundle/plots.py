"""Where things lie in the report's plots. Across, places are shares of the width, so a plot fits any screen; down, they
are pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glm5_hal.conformance.bundle.manifest import Limits
from glm5_hal.conformance.results import Result

#: Shares of the width: where errors begin and end, and where what is beyond them or failed without a number lies. Left
#: of them is what has no error at all.
LEFT, RIGHT, BEYOND = 10.0, 94.0, 97.0

#: Pixels down: from one dot to the next, and around them; how many dots lie above each other at most.
STEP, MARGIN, LINES = 6, 6, 7


@dataclass(frozen=True)
class Dot:
    """A case: its row in the table, where it is, and how it ended ("pass", "fail", "waived")."""

    index: int
    x: float
    y: float
    kind: str
    dtype: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from ``low`` to ``high`` over the places ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        """Within the axis, whatever the value."""
        inside = min(max(value, self.low), self.high)
        share = math.log(inside / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.stop - self.start), 2)


def error_scale(results: Sequence[Result]) -> Scale:
    """From a thousandth of the budget to ten times it; to a thousand times it where something failed."""
    return Scale(1e-3, 10.0 if all(r.verdict in ("PASS", "UNSUPPORTED") for r in results) else 1e3, LEFT, RIGHT)


def error_ticks(scale: Scale) -> list[Tick]:
    """Powers of ten, as shares of the budget."""
    labels = {1e-3: "0.1 %", 1e-2: "1 %", 1e-1: "10 %", 1.0: "budget", 10.0: "10×", 100.0: "100×"}
    return [Tick(scale.place(value), label) for value, label in labels.items() if value < scale.high]


def error_dots(results: Sequence[tuple[int, Result]], scale: Scale) -> tuple[list[Dot], int]:
    """A dot per case that has an error to show or failed, those of like size around each other; and the height that
    they need."""
    places: dict[int, list[tuple[int, float, Result]]] = {}
    exact = 0
    for index, r in sorted(results, key=lambda item: (item[1].worst[0] or 0.0, item[0])):
        kind, ratio = kind_of(r), r.worst[0]
        if kind == "none" or (kind == "pass" and not r.errors):
            continue
        if ratio:
            x = BEYOND if ratio >= scale.high else scale.place(ratio)
        elif kind == "pass":  # side by side where there are many
            x, exact = 1.5 + exact // LINES * 1.1, exact + 1
        else:
            x = BEYOND
        places.setdefault(round(x), []).append((index, x, r))
    lines = min(max(map(len, places.values()), default=1), LINES)
    height = STEP * lines + 2 * MARGIN
    dots = []
    for crowd in places.values():
        for n, (index, x, r) in enumerate(crowd):
            away = (n % LINES + 1) // 2 * (1 if n % 2 else -1)
            dots.append(Dot(index, x, height / 2 + STEP * away, kind_of(r), r.dtype))
    return dots, height


def kind_of(result: Result) -> str:
    """How a case is drawn; "none" where it was not judged."""
    kinds = {"PASS": "pass", "XFAIL": "waived", "UNSUPPORTED": "none"}
    return kinds.get(result.verdict, "fail")


# --- the roofline ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roof:
    """What the device was measured to do with one dtype, as a line that rises with the bandwidth and then is level."""

    dtype: str
    label: str
    x0: float
    y0: float
    x1: float
    y1: float
    x2: float


@dataclass(frozen=True)
class Roofline:
    """Dots and roofs over floating-point operations per byte (across) and per second (down, in pixels)."""

    dots: Sequence[Dot]
    roofs: Sequence[Roof]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    height: int


def of_limit(result: Result, limits: Limits) -> float | None:
    """The least time that the device's measured rates allow for the call's work, over the time that it took."""
    flops = limits.flops_per_second.get(result.dtype)
    if not flops or not limits.bytes_per_second or not result.kernel_seconds or not result.work:
        return None
    least = max(result.work["flops"] / flops, result.work["bytes"] / limits.bytes_per_second)
    return least / result.kernel_seconds or None


def roofline(results: Sequence[Result], limits: Limits, height: int = 300) -> Roofline | None:
    """None where nothing was timed that computes anything, or the device's rates are not known."""
    timed = {
        i: (r.work["flops"] / r.work["bytes"], r.work["flops"] / r.kernel_seconds)
        for i, r in enumerate(results)
        if of_limit(r, limits) and r.verdict == "PASS" and r.work["flops"] and r.work["bytes"]
    }
    if not timed:
        return None
    rates = {d: v for d, v in limits.flops_per_second.items() if any(results[i].dtype == d for i in timed)}
    ridge = max(rates.values()) / limits.bytes_per_second
    xs = [x for x, _ in timed.values()]
    ys = [y for _, y in timed.values()]
    across = Scale(_below(min(xs)), _above(max(*xs, 2 * ridge)), 0.0, 100.0)
    down = Scale(_below(min(ys)), _above(max(*ys, *rates.values())), height - 12.0, 12.0)
    dots = [Dot(i, across.place(x), down.place(y), "pass", results[i].dtype) for i, (x, y) in sorted(timed.items())]
    roofs = [_roof(d, rate, limits.bytes_per_second, across, down) for d, rate in sorted(rates.items())]
    return Roofline(dots, roofs, _ticks(across, "{:g}".format), _ticks(down, lambda v: f"{si(v)}FLOP/s"), height)


def _roof(dtype: str, rate: float, bandwidth: float, across: Scale, down: Scale) -> Roof:
    start = max(across.low, down.low / bandwidth)
    knee = max(rate / bandwidth, start)
    return Roof(
        dtype,
        f"{dtype} {si(rate)}FLOP/s",
        across.place(start),
        down.place(start * bandwidth),
        across.place(knee),
        down.place(rate),
        across.stop,
    )


def _below(value: float) -> float:
    return float(10.0 ** math.floor(math.log10(value)))


def _above(value: float) -> float:
    return float(10.0 ** math.ceil(math.log10(value)))


def _ticks(scale: Scale, label: Callable[[float], str]) -> list[Tick]:
    first, last = round(math.log10(scale.low)), round(math.log10(scale.high))
    step = max(1, math.ceil((last - first) / 6))
    return [Tick(scale.place(10.0**p), label(10.0**p)) for p in range(first, last + 1, step)]


def si(value: float) -> str:
    """A number with the prefix of its thousands: 5.4 G, for a unit to follow."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{_short(value / size)} {prefix}"
    return f"{_short(value)} "


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
