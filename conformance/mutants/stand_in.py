"""A backend whose kernels are plain functions, and the suite's judgement of them.

The device says "simulated", so no result of it can pass for evidence about hardware.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from glm5_hal import context
from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.capability import Requirement
from glm5_hal.catalogue import Catalogue
from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import Case, cases
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.subject import Subject, prepared
from glm5_hal.conformance.target import targets
from glm5_hal.errors import HalError
from glm5_hal.plugins import PluginRecord

NAME = "standin"
EVERY = frozenset({"deterministic", "canonical_ties", "sorted_indices"})


@dataclass(frozen=True)
class Made:
    """A kernel to be judged: the function, what it claims, what it asks for."""

    op: str
    fn: Callable[..., Any]
    provides: frozenset[str] = frozenset()
    requires: tuple[Requirement, ...] = ()
    provider: str = "native"


def probe() -> Device:
    return Device("cpu", "stand-in", "stand-in", evidence="simulated")


@contextmanager
def installed(*kernels: Made, probe: Callable[[], Device | Unavailable] = probe) -> Iterator[Catalogue]:
    """The stand-in beside the CPU backend, with these kernels; then everything as it was."""
    built = tuple(Kernel(k.op, k.provider, k.fn, k.requires, k.provides) for k in kernels)
    backend = Backend(NAME, "cpu", probe, lambda: built)
    record = PluginRecord(
        name=NAME, value="stand_in", dist="stand-in", version="0", builtin=False, status="ok", backend=backend
    )
    context.reset()
    others = tuple(r for r in context.catalogue().records if r.name == "cpu")
    context._process.catalogue = Catalogue((record, *others))
    try:
        yield context._process.catalogue
    finally:
        context.reset()


def made_of(op: str, fn: Callable[..., Any], provides: Iterable[str], requires: Sequence[Requirement] = ()) -> Made:
    """A function as a kernel. What it is made of, it says itself: ``provider``."""
    return Made(op, fn, frozenset(provides), tuple(requires), getattr(fn, "provider", "native"))


def first_failure(op: str, fn: Callable[..., Any], **how: Any) -> Result | None:
    """The first case that fails a kernel; None if none does. Takes what `judge` takes."""
    return next((r for r in results(op, fn, **how) if not r.ok), None)


def judge(op: str, fn: Callable[..., Any], **how: Any) -> list[Result]:
    """What the suite says of one kernel, case by case: `results`, all of them."""
    return list(results(op, fn, **how))


def results(
    op: str,
    fn: Callable[..., Any],
    *,
    provides: Iterable[str] = ("deterministic",),
    requires: Sequence[Requirement] = (),
    seeds: Iterable[int] = (0,),
    level: str = "smoke",
    dtypes: Sequence[str] = ("*",),
    samples: Sequence[str] = ("*",),
    errors: bool = False,
    checks: Sequence[str] | None = None,
    parts: Mapping[str, Callable[..., Any]] | None = None,
) -> Iterator[Result]:
    """What the suite says of one kernel, case by case.

    ``dtypes`` and ``samples`` are globs; ``errors`` adds the bad inputs; ``checks`` leaves out all others; ``parts``
    are kernels of other ops, for a composite that is judged by its default.
    """
    made = [made_of(op, fn, provides, requires)] if fn is not None else []
    made += [Made(name, part, frozenset(provides)) for name, part in (parts or {}).items()]
    chosen = [c for c in all_cases(op, level) if wanted(c, dtypes, samples, errors)]
    with installed(*made):
        for seed in seeds:
            for case in chosen:
                yield judged(case, seed, checks)


def judged(case: Case, seed: int, checks: Sequence[str] | None = None) -> Result:
    """What the suite, or only these checks, say of the installed kernel in one case."""
    (target,) = targets(NAME)
    chosen = CHECKS if checks is None else {name: CHECKS[name] for name in checks}
    return runner.run_case(_prepared(case, seed), case, target, seed, checks=chosen)


def failed(results: Iterable[Result]) -> list[Result]:
    return [r for r in results if not r.ok]


def wanted(case: Case, dtypes: Sequence[str], samples: Sequence[str] = ("*",), errors: bool = False) -> bool:
    """Whether a case is among those that these globs name."""
    if case.bad is not None:
        return errors
    named = any(fnmatch.fnmatch(case.sample.id, s) for s in samples)
    return named and any(fnmatch.fnmatch(case.dtype, d) for d in dtypes)


@cache
def all_cases(op: str, level: str = "smoke") -> tuple[Case, ...]:
    """The cases of a level; float64 is always judged here."""
    wide = (c for c in cases("full", (op,)) if c.dtype == "float64")
    return tuple({c.id: c for c in (*cases(level, (op,)), *wide)}.values())


def good_cases(op: str) -> list[Case]:
    """The smoke cases that run a kernel."""
    return [c for c in all_cases(op) if c.bad is None]


_SUBJECTS: dict[tuple[str, int], Subject | HalError] = {}


def _prepared(case: Case, seed: int) -> Subject | HalError:
    """Oracles are dear, and the same for every kernel."""
    key = case.id, seed
    if key not in _SUBJECTS:
        _SUBJECTS[key] = prepared(case, seed)
    return _SUBJECTS[key]


def subject_of(case: Case, seed: int) -> Subject:
    """A case with its inputs and what is expected of them. Raises HalError where the suite itself failed."""
    found = _prepared(case, seed)
    if isinstance(found, HalError):
        raise found
    return found


def forget(seed: int) -> None:
    """Let go of what is expected under this seed."""
    for key in [k for k in _SUBJECTS if k[1] == seed]:
        del _SUBJECTS[key]
