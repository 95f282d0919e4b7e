"""Compute some cases of a bundle again, from the seed that it names, and compare."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from glm5_hal.conformance.bundle.files import Bundle
from glm5_hal.conformance.bundle.manifest import Facts, Manifest, host
from glm5_hal.conformance.bundle.verify import Problem
from glm5_hal.conformance.results import Result
from glm5_hal.errors import HalError

#: How far the errors of a deterministic kernel may be from the recorded ones, relative to them: the oracle itself
#: is computed anew.
SAME = 1e-3


@dataclass(frozen=True)
class Rerun:
    """What came of it. ``unlike``: what is other here than in the bundle, so that errors were not compared; "" where
    they were."""

    cases: tuple[str, ...]
    unlike: str
    problems: tuple[Problem, ...]


def rerun(bundle: Bundle, count: int, seed: int, device: str | None = None) -> Rerun:
    """Compute ``count`` results again, chosen by ``seed``.

    Verdicts must be the same; so must the inputs' hashes; and the errors, where the kernel claims ``deterministic`` and
    device and versions are those of the bundle.

    Raises:
        HalError: UNKNOWN, PLUGIN or UNAVAILABLE where the bundle's backend or its device is not here.
    """
    import torch

    from glm5_hal.conformance import runner
    from glm5_hal.conformance.cases import find

    selection = bundle.manifest.selection
    chosen = random.Random(seed).sample(bundle.results, min(count, len(bundle.results)))
    judged = {name: runner.targets(name, device)[0] for name in sorted({r.backend for r in chosen})}
    unlike = next(filter(None, (_unlike(bundle.manifest, Facts.of(t.facts)) for t in judged.values())), "")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(bundle.manifest.host.threads, 1))
    problems = []
    try:
        for recorded in chosen:
            try:
                (case,) = find([recorded.case])
            except HalError:
                problems.append(Problem("RERUN", recorded.case, "is not known here"))
                continue
            again = bundle.book.judged(next(runner.run([case], [judged[recorded.backend]], selection.seed)))
            problems += [Problem("RERUN", recorded.case, what) for what in _differences(recorded, again, not unlike)]
    finally:
        torch.set_num_threads(threads)
    return Rerun(tuple(r.case for r in chosen), unlike, tuple(problems))


def _unlike(manifest: Manifest, here: Facts) -> str:
    """Why numbers that are computed here need not be the recorded ones."""
    there = manifest.device
    facts = {name: (getattr(there, name), getattr(here, name)) for name in ("type", "name", "arch", "features")}
    for recorded, mine in ((there.versions, here.versions), (manifest.host.versions, host().versions)):
        # Threads are set as they were.
        names = (recorded.keys() | mine.keys()) - {"threads"}
        facts |= {name: (recorded.get(name), mine.get(name)) for name in sorted(names)}
    return ", ".join(f"{name} {b} here, {a} there" for name, (a, b) in facts.items() if a != b)


def _differences(recorded: Result, again: Result, numbers: bool) -> Iterator[str]:
    if again.verdict != recorded.verdict:
        yield f"recorded as {recorded.verdict}, it is {again.verdict} here: {again.detail}"
    if again.inputs != recorded.inputs:
        yield f"the hash of the inputs is recorded as {recorded.inputs[:12]}…, it is {again.inputs[:12]}… here"
    if again.kernel != recorded.kernel:
        yield f"recorded as served by {recorded.kernel or 'none'}, here it is {again.kernel or 'none'}"
    if tuple(again.claims) != tuple(recorded.claims):
        yield f"recorded claims are {', '.join(recorded.claims)}, here they are {', '.join(again.claims)}"
    if not numbers:
        return
    if dict(again.work) != dict(recorded.work):
        yield f"the work is recorded as {dict(recorded.work)}, it is {dict(again.work)} here"
    if "deterministic" in again.claims:
        for what, mine, theirs in (("error", again.errors, recorded.errors), ("budget", again.budget, recorded.budget)):
            for name in sorted(mine.keys() | theirs.keys()):
                a, b = mine.get(name), theirs.get(name)
                if a is None or b is None or not (a == b or (a != a and b != b) or abs(a - b) <= SAME * abs(a)):
                    yield f"the {what} {name} is recorded as {b}, it is {a} here"
