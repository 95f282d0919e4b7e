"""One `conformance run`, from what was asked for to its results on disk."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_hal.errors import HalError

if TYPE_CHECKING:
    from glm5_hal.conformance.cases import Case
    from glm5_hal.conformance.journal import Journal, Key
    from glm5_hal.conformance.results import Result
    from glm5_hal.conformance.runner import Target
    from glm5_hal.conformance.waivers import Book


@dataclass(frozen=True)
class Session:
    """What was asked for, as the command line has it."""

    backend: str
    out: Path
    plugin: str = ""
    level: str = "smoke"
    ops: tuple[str, ...] = ("*",)
    cases: tuple[str, ...] = ()
    replays: tuple[Path, ...] = ()
    devices: tuple[str | None, ...] = (None,)
    seed: int = 0
    resume: bool = False
    workers: int = 0
    timeout: float | None = None
    memory: float | None = None
    in_process: bool = False


@dataclass(frozen=True)
class Done:
    """A run's results, in case order, and the waivers that they were held against."""

    results: list[Result]
    book: Book


def run(wanted: Session) -> Done:
    """Judge every case that has no result yet, and write the bundle.

    Raises:
        HalError: as `runner.targets`, `waivers.load` and `journal.opened` do.
    """
    return _in_process(wanted) if wanted.in_process else _in_workers(wanted)


def _in_workers(wanted: Session) -> Done:
    import torch

    from glm5_hal.conformance.aftermath import culprits
    from glm5_hal.conformance.plan import Plan, Task
    from glm5_hal.conformance.pool import Pool

    plan = Plan(
        wanted.backend,
        wanted.plugin,
        wanted.devices,
        wanted.workers,
        wanted.seed,
        wanted.timeout,
        wanted.memory,
        1 if _tiny(wanted) else None,
    )
    with Pool(plan) as pool:  # workers load torch while we do
        if _tiny(wanted):
            torch.set_num_threads(1)  # as the workers have: the manifest says how many there were
        chosen = _chosen(wanted)
        judged = pool.targets()
        run = _Run(wanted, chosen, judged)
        with _journal(wanted, chosen, judged, pool.identity) as (journal, keys):
            policies = [t.policy for t in judged]
            todo = [(c, tuple(p for p in policies if (c.id, p) not in journal.results)) for c in chosen]
            results = pool.run([Task(c, left) for c, left in todo if left])
            return run.kept(journal, keys, results, lambda: culprits(plan, pool.incidents, journal.results))


def _in_process(wanted: Session) -> Done:
    import torch

    from glm5_hal.conformance import identity, report, runner

    if len(wanted.devices) > 1 or wanted.workers > 1:
        what = "one process uses one device"
        raise HalError("CONFIG", what, value=wanted.devices, fix="leave out --in-process, or the other devices")
    judged = runner.targets(wanted.backend, wanted.devices[0], wanted.plugin)
    chosen = _chosen(wanted)
    if _tiny(wanted):
        torch.set_num_threads(1)
    run = _Run(wanted, chosen, judged)
    with _journal(wanted, chosen, judged, identity.of_backend(judged[0])) as (journal, keys):

        def results() -> Iterator[Result]:
            for case in chosen:
                left = [t for t in judged if (case.id, t.policy) not in journal.results]
                yield from runner.run([case], left, wanted.seed)

        with report.kernels_print_to_stderr():
            return run.kept(journal, keys, results())


def _chosen(wanted: Session) -> list[Case]:
    from glm5_hal.conformance import cases

    if wanted.cases or wanted.replays:
        from glm5_hal.conformance import replay

        return cases.find(wanted.cases) + [replay.case(file) for file in wanted.replays]
    return list(cases.cases(wanted.level, wanted.ops))


def _tiny(wanted: Session) -> bool:
    """Small tensors gain nothing from threads, and stall in them on a busy machine."""
    if wanted.cases or wanted.replays:
        return all(c.sample.level == "smoke" for c in _chosen(wanted))
    return wanted.level == "smoke"


@contextmanager
def _journal(
    wanted: Session, chosen: list[Case], judged: list[Target], backend: Any
) -> Iterator[tuple[Journal, list[Key]]]:
    from glm5_hal.conformance import identity, journal

    policies = [t.policy for t in judged]
    level = "" if wanted.cases or wanted.replays else wanted.level
    which = identity.of_run(backend, policies, level, wanted.seed, chosen)
    with journal.opened(wanted.out, which, resume=wanted.resume) as opened:
        yield opened, [(case.id, policy) for case in chosen for policy in policies]


class _Run:
    """What becomes of results: excused where a waiver says so, kept as they come, and made a bundle at the end."""

    def __init__(self, wanted: Session, chosen: list[Case], judged: list[Target]) -> None:
        from glm5_hal.conformance import waivers
        from glm5_hal.conformance.bundle.manifest import now

        facts = judged[0].facts
        self.wanted, self.chosen, self.judged = wanted, chosen, judged
        self.book = waivers.load(judged[0].backend, facts.name, facts.versions, wanted.plugin)
        self.started = now()

    def kept(
        self,
        journal: Journal,
        keys: list[Key],
        results: Iterator[Result],
        corrections: Callable[[], Iterable[Result]] = tuple,
    ) -> Done:
        """Results into the journal as they come, and then what replaces some of them; at last the whole, in order, and
        the bundle."""
        from glm5_hal.conformance import report
        from glm5_hal.conformance.journal import writable

        failed = sum(not r.ok for r in journal.results.values())
        with report.shown(len(keys), len(journal.results)) as note:
            for result in map(self.book.judged, results):
                journal.add(result)
                failed += not result.ok
                note(result.case, failed)
        for result in corrections():
            journal.add(self.book.judged(result))
        ordered = journal.finish(keys)
        if not self.wanted.replays:  # a user's own tensors: nobody else could draw them
            with writable(journal.folder):
                self._bundle(journal.folder, ordered)
        return Done(ordered, self.book)

    def _bundle(self, folder: Path, results: list[Result]) -> None:
        from glm5_hal.conformance.bundle import files
        from glm5_hal.conformance.bundle.manifest import Selection

        wanted = self.wanted
        policies = tuple(t.policy for t in self.judged)
        selection = Selection(wanted.level, wanted.ops, wanted.cases, policies, wanted.seed)
        files.write(folder, results, selection, [c.id for c in self.chosen], self.judged, self.book, self.started)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that no worker is left and what is judged is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
