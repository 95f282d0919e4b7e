"""CONFORMANT is said of a profile: named cases that must all pass in a full run on hardware."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from glm5_hal.conformance.globs import matches
from glm5_hal.conformance.results import Result

if TYPE_CHECKING:
    from glm5_hal.conformance.bundle.manifest import Manifest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: The level that a claim needs.
LEVEL = "full"


@dataclass(frozen=True)
class Profile:
    """What serving in one way needs: the cases that match ``cases`` and not ``excepted`` are mandatory."""

    name: str
    title: str
    cases: tuple[str, ...]
    excepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """Whether a run makes one target ("backend:provider") conformant to a profile, and if not, every reason.

    ``mandatory``, ``passed``: how many cases the profile demands, and how many of them PASS. ``waived``: XFAIL cases
    of the target anywhere in the run, which are named beside the claim and count for nothing in it.
    """

    profile: str
    title: str
    target: str
    mandatory: int
    passed: int
    waived: int
    reasons: tuple[str, ...]

    @property
    def conformant(self) -> bool:
        return not self.reasons


@cache
def profiles() -> tuple[Profile, ...]:
    """The profiles of ``profiles.toml``."""
    text = Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8")
    return tuple(
        Profile(p["name"], p["title"], tuple(p["cases"]), tuple(p["except"])) for p in tomllib.loads(text)["profile"]
    )


@cache
def mandatory(profile: Profile) -> frozenset[str]:
    """The ids of a profile's cases."""
    from glm5_hal.conformance.cases import cases

    return frozenset(c.id for c in cases(LEVEL) if matches(c.id, profile.cases) and not matches(c.id, profile.excepted))


def claims(manifest: Manifest, results: Sequence[Result]) -> tuple[Claim, ...]:
    """Every profile for every target of a run."""
    found = []
    for target in manifest.selection.targets:
        mine = {r.case: r.verdict for r in results if r.backend == target}
        strange = sum(r.backend == target and bool(r.remark) and not r.culprit for r in results)
        waived = sum(verdict == "XFAIL" for verdict in mine.values())
        for profile in profiles():
            needed = mandatory(profile)
            passed = sum(mine.get(case) == "PASS" for case in needed)
            reasons = (*_of_the_run(manifest, target), *_of_the_workers(strange), *_of_the_cases(needed, mine))
            found.append(Claim(profile.name, profile.title, target, len(needed), passed, waived, reasons))
    return tuple(found)


def _of_the_run(manifest: Manifest, target: str) -> Iterator[str]:
    if target.partition(":")[2] == "reference":
        yield "the reference is what others are measured by, and is never called conformant"
    if manifest.device.evidence != "hardware":
        yield f"the evidence is {manifest.device.evidence}, not hardware"
    if manifest.selection.level != LEVEL or not manifest.selection.whole:
        part = "" if manifest.selection.whole else ", in part"
        yield f"the run was {manifest.selection.level}{part}; a whole run at level {LEVEL} is needed"
    if not manifest.suite.clean:
        yield "the suite was not as committed or released"


def _of_the_workers(strange: int) -> Iterator[str]:
    """Some kernel damages its process. It may be one of this target's that passes, whatever case it showed in."""
    if strange:
        what = "case" if strange == 1 else "cases"
        yield f"in {strange} {what} a worker was damaged, and which kernel did that is not known"


def _of_the_cases(needed: frozenset[str], verdicts: dict[str, str]) -> Iterator[str]:
    others: dict[str, int] = {}
    for case in needed:
        verdict = verdicts.get(case, "not in the run")
        if verdict != "PASS":
            others[verdict] = others.get(verdict, 0) + 1
    if not needed:
        yield "the profile matches no case"
    for verdict, count in sorted(others.items()):
        yield f"{count} of {len(needed)} mandatory cases: {verdict}"
