"""Two bundles case by case: what became better or worse, how much further from the truth, how much slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from glm5_hal.conformance.bundle.files import Bundle
from glm5_hal.conformance.bundle.manifest import Manifest
from glm5_hal.conformance.results import VERDICTS, Result

if TYPE_CHECKING:
    from rich.console import RenderableType

#: From which factor on a change of error or of time is worth a line. Single calls are noisy.
ERROR, TIME = 1.5, 1.5

#: Where a case is in one bundle only.
ABSENT = "absent"


@dataclass(frozen=True)
class Change:
    """A case that ended otherwise."""

    case: str
    a: str
    b: str
    why: str

    @property
    def worse(self) -> bool:
        return VERDICTS.get(self.a, True) and not VERDICTS.get(self.b, False)


@dataclass(frozen=True)
class Ratio:
    """A case whose error, as a share of its budget, or whose time changed by ``factor`` (b over a)."""

    case: str
    a: float
    b: float
    factor: float


@dataclass(frozen=True)
class Speed:
    """The median of B's time over A's, over an op's timed cases."""

    op: str
    cases: int
    factor: float


@dataclass(frozen=True)
class Diff:
    """``pairs``: which target of A was compared with which of B. ``notes``: what else differs, so that it is not put
    down to the kernels. ``speed``: by op, the median factor of one call's time; a single call is too noisy to list."""

    pairs: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    cases: int
    verdicts: tuple[Change, ...]
    errors: tuple[Ratio, ...]
    times: tuple[Ratio, ...]
    speed: tuple[Speed, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def diff(a: Bundle, b: Bundle) -> Diff:
    """Verdict changes, worse ones first; then errors and times, the largest change first."""
    pairs = paired(a.manifest.selection.targets, b.manifest.selection.targets)
    first, second = _by_case(a.results, [x for x, _ in pairs]), _by_case(b.results, [y for _, y in pairs])
    both = [(name, first[name], second[name]) for name in first if name in second]
    changes = [Change(n, x.verdict, y.verdict, y.detail or x.detail) for n, x, y in both if x.verdict != y.verdict]
    changes += [Change(n, r.verdict, ABSENT, "") for n, r in first.items() if n not in second]
    changes += [Change(n, ABSENT, r.verdict, r.detail) for n, r in second.items() if n not in first]
    timed = [(n, x.kernel_seconds, y.kernel_seconds) for n, x, y in both if x.ok and y.ok]
    return Diff(
        pairs=pairs,
        notes=tuple(_notes(a.manifest, b.manifest)),
        cases=len(first.keys() | second.keys()),
        verdicts=tuple(sorted(changes, key=lambda c: (not c.worse, ABSENT in (c.a, c.b), c.case))),
        errors=_ratios([(n, x.worst[0], y.worst[0]) for n, x, y in both], ERROR),
        times=_ratios(timed, TIME),
        speed=_speed(timed),
    )


def paired(a: Sequence[str], b: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Targets that are the same, then those of the same provider, then what is left over, in order."""
    found = [(x, x) for x in a if x in b]
    for alike in (lambda x, y: x.partition(":")[2] == y.partition(":")[2], lambda x, y: True):
        for x in a:
            free = [y for y in b if y not in {pair[1] for pair in found} and alike(x, y)]
            if x not in {pair[0] for pair in found} and free:
                found.append((x, free[0]))
    return tuple(found)


def _by_case(results: Sequence[Result], targets: Sequence[str]) -> dict[str, Result]:
    several = len(targets) > 1
    order = {target: n for n, target in enumerate(targets)}
    return {f"{r.case}{f' #{order[r.backend] + 1}' if several else ''}": r for r in results if r.backend in order}


def _ratios(values: Sequence[tuple[str, float | None, float | None]], least: float) -> tuple[Ratio, ...]:
    found = [Ratio(name, a, b, b / a) for name, a, b in values if a and b and a < float("inf")]
    far = [r for r in found if not 1 / least < r.factor < least]
    return tuple(sorted(far, key=lambda r: (-max(r.factor, 1 / r.factor), r.case)))


def _speed(timed: Sequence[tuple[str, float, float]]) -> tuple[Speed, ...]:
    factors: dict[str, list[float]] = {}
    for name, a, b in timed:
        if a and b:
            factors.setdefault(name.partition("[")[0], []).append(b / a)
    rows = [Speed(op, len(values), sorted(values)[len(values) // 2]) for op, values in factors.items()]
    return tuple(sorted(rows, key=lambda s: (-s.factor, s.op)))


def _notes(a: Manifest, b: Manifest) -> list[str]:
    facts = {
        "device": (a.device.name, b.device.name),
        "evidence": (a.device.evidence, b.device.evidence),
        "seed (so the inputs differ)": (a.selection.seed, b.selection.seed),
        "level": (a.selection.level, b.selection.level),
        "suite": (f"{a.suite.version} {a.suite.commit[:10]}", f"{b.suite.version} {b.suite.commit[:10]}"),
    }
    names = {**a.device.versions, **b.device.versions}
    facts |= {name: (a.device.versions.get(name, "none"), b.device.versions.get(name, "none")) for name in names}
    notes = [f"{name}: {x}, {y}" for name, (x, y) in facts.items() if x != y]
    other = sorted(op for op in a.specs.keys() | b.specs.keys() if a.specs.get(op) != b.specs.get(op))
    return notes + ([f"specs of other content: {', '.join(other)}"] if other else [])


def render(found: Diff, most: int = 20) -> RenderableType:
    """The differences for a terminal."""
    from rich.box import SIMPLE
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"{x} against {y}") for x, y in found.pairs]
    parts += [Text(f"differs: {note}", style="dim") for note in found.notes]
    worse = sum(c.worse for c in found.verdicts)
    parts.append(Text(f"\n{found.cases} cases, {len(found.verdicts)} verdicts differ, {worse} of them worse", "bold"))
    if found.verdicts:
        table = Table("A", "B", "case", "why", box=SIMPLE, header_style="bold")
        for c in found.verdicts:
            table.add_row(c.a, Text(c.b, "red" if c.worse else ""), Text(c.case), Text(c.why))
        parts.append(table)
    if found.errors:
        table = Table("case", box=SIMPLE, header_style="bold", title="error / budget", title_justify="left")
        for column in ("A", "B", "B/A"):
            table.add_column(column, justify="right")
        for r in found.errors[:most]:
            table.add_row(Text(r.case), f"{r.a:.1%}", f"{r.b:.1%}", f"{r.factor:.2f}×")
        parts.append(table)
        if len(found.errors) > most:
            parts.append(Text(f"and {len(found.errors) - most} more (--json has all)", style="dim"))
    if found.speed:
        table = Table("op", box=SIMPLE, header_style="bold", title="time, median B/A", title_justify="left")
        table.add_column("cases", justify="right")
        table.add_column("B/A", justify="right")
        for s in found.speed:
            table.add_row(s.op, str(s.cases), f"{s.factor:.2f}×")
        parts.append(table)
    return Group(*parts)
