"""Judge the suite: every mutant must fail it, every honest kernel must pass."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.mutants import mechanical, pool, wrong
from glm5_hal.conformance.mutants.honest import catalogue
from glm5_hal.errors import HalError, suggest
from glm5_hal.ops import names

LEVELS = ("quick", "full")

#: The quick level takes one mutant in so many, always the same ones.
SAMPLE = 6

#: Every honest kernel is measured on every draw; one of each op goes through every check on the first.
MEASURED = ("form", "accuracy")

#: Seconds that one case may take before its kernel is taken to hang.
DEADLINE = 60.0


@dataclass(frozen=True)
class Mutant:
    """One wrong kernel.

    Attributes:
        kind: "hand" or "mechanical".
        theme: its class in the kill matrix.
        digest: of what it is, by which a sample is taken.
        ops: the ops that have it; none for a line that nothing executes.
        cases: those that execute it, by op; None for all of its op.
        why: the argument that it is no mistake.
        needs: what finds it, where no run of the suite can.
    """

    id: str
    kind: str
    theme: str
    digest: str
    ops: tuple[str, ...] = ()
    cases: Mapping[str, Sequence[str]] | None = None
    why: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant. ``checks``: those that failed it; ``by``: the first of them; both empty if none did."""

    mutant: Mutant
    checks: tuple[str, ...] = ()
    by: str = ""
    case: str = ""
    detail: str = ""

    @property
    def status(self) -> str:
        if self.mutant.kind == "mechanical" and not self.mutant.ops:
            return "not executed"
        if self.mutant.why:
            return "wrongly argued" if self.checks else "equivalent"
        if self.checks:
            return "killed" if self.checks != ("error",) else "error"
        return "pending" if self.mutant.needs and self.mutant.needs not in CHECKS else "survived"


@dataclass(frozen=True)
class Report:
    """Of a self test: see `as_dict`."""

    outcomes: tuple[Outcome, ...]
    alarms: tuple[str, ...]
    honest: Mapping[str, int]
    stale: tuple[str, ...]
    level: str

    def of(self, status: str) -> list[Outcome]:
        return [o for o in self.outcomes if o.status == status]

    @property
    def mutants(self) -> int:
        """How many mutants count: they run, and are mistakes that the suite has a check for."""
        return sum(o.status in ("killed", "survived", "error") for o in self.outcomes)

    @property
    def ok(self) -> bool:
        bad = self.alarms or self.stale or self.of("survived") or self.of("wrongly argued") or self.of("error")
        return not bad and self.mutants > 0

    def matrix(self) -> dict[str, dict[str, int]]:
        """Check -> class of mutants -> how many of them it failed."""
        found: dict[str, dict[str, int]] = {}
        for outcome in self.of("killed"):
            for check in outcome.checks:
                row = found.setdefault(check, {})
                row[outcome.mutant.theme] = row.get(outcome.mutant.theme, 0) + 1
        return found

    def marginal(self) -> dict[str, list[str]]:
        """Check -> mutants that nothing else failed; [] for a check that the suite could do without."""
        found: dict[str, list[str]] = {name: [] for name in CHECKS}
        for outcome in self.of("killed"):
            if len(outcome.checks) == 1:
                found.setdefault(outcome.checks[0], []).append(outcome.mutant.id)
        return found

    def as_dict(self) -> dict[str, Any]:
        kinds = [o.mutant.kind for o in self.outcomes if o.status in ("killed", "survived", "error")]
        return {
            "ok": self.ok,
            "level": self.level,
            "mutants": self.mutants,
            "killed": len(self.of("killed")),
            "mechanical": kinds.count("mechanical"),
            "false_alarms": len(self.alarms),
            "honest": dict(self.honest),
            "survivors": [_told(o) for o in self.of("survived") + self.of("error")],
            "pending": [_told(o) | {"needs": o.mutant.needs} for o in self.of("pending")],
            "equivalent": [_told(o) | {"why": o.mutant.why} for o in self.of("equivalent")],
            "wrongly_argued": [_told(o) for o in self.of("wrongly argued")],
            "not_executed": [o.mutant.id for o in self.of("not executed")],
            "stale": list(self.stale),
            "alarms": list(self.alarms),
            "matrix": self.matrix(),
            "marginal": {check: len(ids) for check, ids in self.marginal().items()},
            "kills": {o.mutant.id: list(o.checks) for o in self.of("killed")},
        }


def _told(outcome: Outcome) -> dict[str, Any]:
    return {"id": outcome.mutant.id, "ops": list(outcome.mutant.ops), "case": outcome.case, "detail": outcome.detail}


Show = Callable[[int, int, str], None]


def run(
    only: Sequence[str] = ("*",),
    level: str = "full",
    seeds: int | None = None,
    everything: bool = False,
    workers: int = 2,
    deadline: float = DEADLINE,
    show: Show = lambda done, total, what: None,
) -> Report:
    """Judge the suite.

    Args:
        only: globs of ops.
        level: "full", or "quick": a fixed sample of the mutants and two draws.
        seeds: draws that honest kernels are judged on; None: 20, or 2 at the quick level.
        everything: go on after a mutant's first failing case, to see what else fails it; judge the equivalent ones too.
        workers: processes.
        deadline: seconds that one case may take.
        show: called with what is done, what there is, and what happens.
    """
    if level not in LEVELS:
        raise HalError("CONFIG", f"no level {level!r}", value=level, fix=suggest(level, LEVELS))
    wanted = [op for op in names() if any(fnmatch.fnmatch(op, glob) for glob in only)]
    if not wanted:
        raise HalError("UNKNOWN", f"no op matches {', '.join(only)}", value=only, fix=suggest(only[0], names()))
    argued = mechanical.equivalents()
    machine = by_machine(wanted, argued.why, workers, deadline, show)
    mutants = [m for m in [*by_hand(wanted), *machine] if level == "full" or int(m.digest, 16) % SAMPLE == 0]
    draws = seeds if seeds is not None else 20 if level == "full" else 2
    jobs: list[pool.Job] = [todo for m in mutants if (todo := _job(m, everything))]
    jobs += _honest(wanted, level, draws)
    known = {m.id: m for m in mutants}
    outcomes = [Outcome(m) for m in mutants if not _job(m, everything)]
    alarms, cases = list[str](), 0
    for done, (job, answer) in enumerate(pool.run(jobs, workers, deadline), 1):
        if job["do"] == "honest":
            alarms += answer.get("alarms", [f"{job['op']} seed {job['seed']}: {answer.get('lost')}"])
            cases += answer.get("cases", 0)
            show(done, len(jobs), f"honest {job['op']}, seed {job['seed']}")
        else:
            outcomes.append(_outcome(known[job["id"]], answer))
            show(done, len(jobs), job["id"])
    judged = {"kernels": sum(len(_ways(op, level)) for op in wanted), "seeds": draws, "cases": cases}
    order = {m.id: i for i, m in enumerate(mutants)}
    outcomes.sort(key=lambda o: order[o.mutant.id])
    return Report(tuple(outcomes), tuple(alarms), judged, argued.stale, level)


def by_hand(wanted: Sequence[str]) -> Iterator[Mutant]:
    """The wrong kernels and the cheats of these ops."""
    for theme, group in wrong.THEMES.items():
        for w in group:
            if w.op in wanted:
                digest = hashlib.sha256(w.id.encode()).hexdigest()[:12]
                yield Mutant(w.id, "hand", theme, digest, (w.op,), needs=w.needs)


def by_machine(
    wanted: Sequence[str], why: Mapping[str, str], workers: int, deadline: float, show: Show
) -> Iterator[Mutant]:
    """The mutants of our own source that these ops execute, and those that nothing does; each with the cases of all ops
    that execute it."""
    jobs: list[pool.Job] = [{"do": "trace", "op": op} for op in mechanical.kernels()]
    lines: dict[str, dict[str, list[str]]] = {}
    for done, (job, answer) in enumerate(pool.run(jobs, workers, deadline), 1):
        if "lost" in answer:
            raise RuntimeError(f"{job['op']} could not be traced: {answer['detail']}")
        show(done, len(jobs), f"what {job['op']} executes")
        for case, executed in answer.items():
            for line in executed:
                lines.setdefault(line, {}).setdefault(job["op"], []).append(case)
    order = list(mechanical.kernels())
    for m in mechanical.all_mutants():
        first, last = m.mutation.lines
        hit: dict[str, dict[str, None]] = {}
        for line in range(first, last + 1):
            for op, cases in lines.get(f"{m.module}:{line}", {}).items():
                hit.setdefault(op, {}).update(dict.fromkeys(cases))
        cases_of = {op: list(hit[op]) for op in order if op in hit}
        if not hit or set(hit) & set(wanted):
            yield Mutant(
                m.id, "mechanical", m.mutation.operator, m.digest, tuple(cases_of), cases_of, why.get(m.digest, "")
            )


def _job(m: Mutant, everything: bool) -> dict[str, Any] | None:
    """None for a mutant that need not be judged."""
    if m.kind == "hand":
        return {"do": "by_hand", "id": m.id, "everything": everything}
    if not m.ops or (m.why and not everything):
        return None
    return {"do": "by_machine", "id": m.id, "cases": m.cases, "everything": everything}


def _ways(op: str, level: str) -> list[str]:
    """The honest kernels of an op; its first one at the quick level."""
    return list(catalogue.HONEST[op])[: None if level == "full" else 1]


def _honest(wanted: Sequence[str], level: str, draws: int) -> Iterator[dict[str, Any]]:
    for op in wanted:
        ways = _ways(op, level)
        yield {"do": "honest", "op": op, "names": ways[:1], "seed": 0, "checks": None}
        for seed in range(draws):
            yield {"do": "honest", "op": op, "names": ways, "seed": seed, "checks": MEASURED}


def _outcome(mutant: Mutant, answer: pool.Answer) -> Outcome:
    if "lost" in answer:
        return Outcome(mutant, (answer["lost"],), answer["lost"], "", answer["detail"])
    return Outcome(mutant, tuple(answer["checks"]), answer["by"], answer["case"], answer["detail"])
