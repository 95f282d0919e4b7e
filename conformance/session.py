"""One `conformance run`, from what was asked for to its results on disk."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_hal.errors import HalError

if TYPE_CHECKING:
    from glm5_hal.conformance.cases import Case
    from glm5_hal.conformance.journal import Journal, Key
    from glm5_hal.conformance.results import Result
    from glm5_hal.conformance.target import Target
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

    @cached_property
    def chosen(self) -> list[Case]:
        """The cases, in order."""
        from glm5_hal.conformance import cases

        if self.cases or self.replays:
            from glm5_hal.conformance import replay

            return cases.find(self.cases) + [replay.case(file) for file in self.replays]
        return list(cases.cases(self.level, self.ops))

    @property
    def tiny(self) -> bool:
        """Small tensors gain nothing from threads, and stall in them on a busy machine."""
        if self.cases or self.replays:
            return all(c.sample.level == "smoke" for c in self.chosen)
        return self.level == "smoke"


@dataclass(frozen=True)
class Done:
    """A run's results, in case order, and the waivers that they were held against."""

    results: list[Result]
    book: Book


def run(wanted: Session) -> Done:
    """Judge every case that has no result yet, and write the bundle.

    Raises:
        HalError: as `targets`, `waivers.load` and `journal.opened` do.
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
        1 if wanted.tiny else None,
    )
    with Pool(plan) as pool:  # workers load torch while we do
        chosen, greeting = wanted.chosen, pool.greeted()
        judged = list(greeting.targets)
        torch.set_num_threads(greeting.threads)  # of which the manifest tells, and with which it measures the limits
        run = _Run(wanted, judged, greeting.waivers)
        with _journal(wanted, judged, greeting.identity) as (journal, keys):
            policies = [t.policy for t in judged]
            todo = [(c, tuple(p for p in policies if (c.id, p) not in journal.results)) for c in chosen]
            results = pool.run([Task(c, left) for c, left in todo if left])
            return run.kept(journal, keys, results, lambda: culprits(plan, pool.incidents, journal.results))


def _in_process(wanted: Session) -> Done:
    import torch

    from glm5_hal.conformance import identity, runner, waivers
    from glm5_hal.conformance.process import kernels_print_to_stderr
    from glm5_hal.conformance.target import targets

    if len(wanted.devices) > 1 or wanted.workers > 1:
        what = "one process uses one device"
        raise HalError("CONFIG", what, value=wanted.devices, fix="leave out --in-process, or the other devices")
    judged = targets(wanted.backend, wanted.devices[0], wanted.plugin)
    if wanted.tiny:
        torch.set_num_threads(1)
    run = _Run(wanted, judged, waivers.shipped(judged[0].backend))
    with _journal(wanted, judged, identity.of_backend(judged[0])) as (journal, keys):

        def results() -> Iterator[Result]:
            for case in wanted.chosen:
                left = [t for t in judged if (case.id, t.policy) not in journal.results]
                yield from runner.run([case], left, wanted.seed)

        with kernels_print_to_stderr():
            return run.kept(journal, keys, results())


@contextmanager
def _journal(wanted: Session, judged: list[Target], backend: Any) -> Iterator[tuple[Journal, list[Key]]]:
    from glm5_hal.conformance import identity, journal

    policies = [t.policy for t in judged]
    level = "" if wanted.cases or wanted.replays else wanted.level
    which = identity.of_run(backend, policies, level, wanted.seed, wanted.chosen)
    with journal.opened(wanted.out, which, resume=wanted.resume) as opened:
        yield opened, [(case.id, policy) for case in wanted.chosen for policy in policies]


class _Run:
    """What becomes of results: kept as they come, excused at the end where a waiver says so, and made a bundle."""

    def __init__(self, wanted: Session, judged: list[Target], shipped: tuple[str, str]) -> None:
        from glm5_hal.conformance import waivers

        facts = judged[0].facts
        self.wanted, self.judged = wanted, judged
        self.book = waivers.book(shipped, facts.name, facts.versions)

    def kept(
        self,
        journal: Journal,
        keys: list[Key],
        results: Iterator[Result],
        corrections: Callable[[], Iterable[Result]] = tuple,
    ) -> Done:
        """Results into the journal as they come, and then what replaces some of them; at last the whole, in order, and
        the bundle. The journal has them as they are: what a waiver excuses is for the day on which the run ends."""
        from glm5_hal.conformance import report
        from glm5_hal.conformance.bundle.manifest import day_of, now
        from glm5_hal.conformance.journal import writable

        journal.results |= {key: self._plain(result) for key, result in journal.results.items()}
        failed = sum(not self.book.judged(r).ok for r in journal.results.values())
        with report.shown(len(keys), len(journal.results)) as note:
            for result in results:
                journal.add(result)
                failed += not self.book.judged(result).ok
                note(result.case, failed)
        for result in corrections():
            journal.add(result)
        ended = now()
        book = replace(self.book, day=day_of(ended))
        ordered = journal.finish(keys, book.judged)
        if not self.wanted.replays:  # a user's own tensors: nobody else could draw them
            with writable(journal.folder):
                self._bundle(journal, ordered, book, ended)
        return Done(ordered, book)

    def _plain(self, result: Result) -> Result:
        """A run that was complete has its results as they were excused."""
        try:
            return self.book.unexcused(result)
        except KeyError:
            what = f"{result.case} was {result.verdict} by waiver {result.waiver!r}, which is gone"
            raise HalError("CONFIG", what, value=result.waiver, fix="run without --resume") from None

    def _bundle(self, journal: Journal, results: list[Result], book: Book, ended: str) -> None:
        from glm5_hal.conformance.bundle import files
        from glm5_hal.conformance.bundle.manifest import Selection

        wanted = self.wanted
        policies = tuple(t.policy for t in self.judged)
        selection = Selection(wanted.level, wanted.ops, wanted.cases, policies, wanted.seed)
        ids = [c.id for c in wanted.chosen]
        files.write(journal.folder, results, selection, ids, self.judged, book, (journal.started, ended))


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
