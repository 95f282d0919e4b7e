"""Compute some cases of a bundle again, from the seed that it names, and compare.

In worker processes, as the run itself: what is recorded as a crash or a hang is one here, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from glm5_hal.conformance.bundle.files import Bundle
from glm5_hal.conformance.bundle.manifest import Facts, Manifest, host
from glm5_hal.conformance.bundle.verify import Problem
from glm5_hal.conformance.cases import cases as every
from glm5_hal.conformance.cases import find
from glm5_hal.conformance.plan import Plan, Task
from glm5_hal.conformance.pool import Pool
from glm5_hal.conformance.results import Result

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


def rerun(bundle: Bundle, count: int, seed: int, device: str | None = None, plugin: str = "") -> Rerun:
    """Compute ``count`` results again, chosen by ``seed``. ``plugin`` is where a backend comes from that is not
    installed.

    Verdicts must be the same; so must the inputs' hashes; and the errors, where the kernel claims ``deterministic`` and
    device and versions are those of the bundle. A case that damages what comes after it passes by itself, so those are
    never chosen.

    Raises:
        HalError: UNKNOWN, PLUGIN or UNAVAILABLE where the bundle's backend or its device is not here.
    """
    said = bundle.manifest
    eligible = [r for r in bundle.results if r.code != "AFTERMATH"]
    chosen = random.Random(seed).sample(eligible, min(count, len(eligible)))
    known = {case.id for case in every("full")}
    here: list[Facts] = []
    again: dict[tuple[str, str], Result] = {}
    for policy in sorted({r.backend for r in chosen}):
        cases = tuple(dict.fromkeys(r.case for r in chosen if r.backend == policy and r.case in known))
        plan = Plan(policy, plugin, (device,), seed=said.selection.seed, threads=said.host.threads)
        facts, results = computed(plan, cases)
        here.append(facts)
        again |= {(r.case, r.backend): bundle.book.judged(r) for r in results}
    unlike = next(filter(None, (_unlike(said, facts) for facts in here)), "")
    problems = []
    for recorded in chosen:
        found = again.get((recorded.case, recorded.backend))
        differences = ["is not known here"] if found is None else _differences(recorded, found, not unlike)
        problems += [Problem("RERUN", recorded.case, what) for what in differences]
    return Rerun(tuple(r.case for r in chosen), unlike, tuple(problems))


def computed(plan: Plan, cases: tuple[str, ...]) -> tuple[Facts, tuple[Result, ...]]:
    """The device, and what the plan's one provider gives in these cases."""
    with Pool(plan) as pool:
        (target,) = pool.targets()
        return Facts.of(target.facts), tuple(pool.run([Task(case, (target.policy,)) for case in find(cases)]))


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
