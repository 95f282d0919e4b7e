"""What a report shows of a bundle, before it is Markdown or HTML."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glm5_hal.conformance.bundle import plots
from glm5_hal.conformance.bundle.manifest import Manifest
from glm5_hal.conformance.profiles import Claim
from glm5_hal.conformance.results import VERDICTS, Result, lacks, succeeded
from glm5_hal.conformance.waivers import Book, Tally, Waiver, counted

#: What a kind of evidence says about the chip.
EVIDENCE = {
    "hardware": "computed on the device that is named here",
    "emulated": "the vendor's real schemas with CPU maths: it says nothing about the chip's numbers",
    "interpreted": "run by an interpreter on a CPU: it says nothing about the chip's numbers",
    "simulated": "run on a stand-in for the device: it says nothing about the chip's numbers",
    "compiled": "compiled ahead of time and never run",
}

#: What the verdicts mean, in one line each.
MEANING = {
    "PASS": "every check that applies is met",
    "FAIL": "a check failed, or the kernel raised",
    "XFAIL": "failed, and a waiver excuses it until it expires",
    "XPASS": "passed although a waiver expects a failure; the waiver must go",
    "UNSUPPORTED": "the kernel declares that it does not take such a call",
    "MISTRUSTED": "the inputs prove nothing about a kernel",
    "CRASH": "the process died",
    "HANG": "no answer in time",
    "OOM": "the device ran out of memory",
    "ERROR": "the suite itself failed",
}

_ELEMENT = re.compile(r"at (\[[\d, ]*\]|flat index \d+):? (?:got )?(\S+?),? (?:expected|and) (\S+)")


@dataclass(frozen=True)
class OpRow:
    """All cases of one op on one target. ``share`` is the median part of the measured limit, of what passed."""

    op: str
    target: str
    counts: Mapping[str, int]
    cases: int
    worst: float | None
    criterion: str
    share: float | None
    dots: Sequence[plots.Dot]
    height: int
    failed: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class Failure:
    """A case that lets the run fail, with the first wrong element where one is known: (where, got, expected)."""

    index: int
    result: Result
    element: tuple[str, str, str] | None


@dataclass(frozen=True)
class Failures:
    """Cases of one op that fail for one reason on one target: the first, and the others."""

    first: Failure
    others: Sequence[Failure]


@dataclass(frozen=True)
class Unsupported:
    """Cases that are refused for one reason."""

    code: str
    detail: str
    target: str
    cases: Sequence[str]


@dataclass(frozen=True)
class View:
    """What a report shows, in the order in which it does."""

    manifest: Manifest
    headline: str
    ok: bool
    evidence: str
    counts: Mapping[str, int]
    waived: str
    claims: Sequence[Claim]
    rows: Sequence[OpRow]
    scale: plots.Scale
    ticks: Sequence[plots.Tick]
    failures: Sequence[Failures]
    unsupported: Sequence[Unsupported]
    waivers: Sequence[tuple[Waiver, Tally]]
    roofline: plots.Roofline | None
    results: Sequence[Result]


def view(manifest: Manifest, results: Sequence[Result], book: Book, claims: Sequence[Claim]) -> View:
    """Everything that the report says, from what the bundle holds."""
    scale = plots.error_scale(results)
    tallies = {t.id: t for t in book.tally(results)}
    return View(
        manifest=manifest,
        headline=_headline(results),
        ok=succeeded(results),
        evidence=EVIDENCE.get(manifest.device.evidence, "not known"),
        counts={v: n for v in VERDICTS if (n := sum(r.verdict == v for r in results))},
        waived=counted(list(tallies.values())) or "no waivers",
        claims=claims,
        rows=_rows(manifest, results, scale),
        scale=scale,
        ticks=plots.error_ticks(scale),
        failures=_failures(results),
        unsupported=_unsupported(results),
        waivers=[(w, tallies[w.id]) for w in book.waivers],
        roofline=plots.roofline(results, manifest.limits),
        results=results,
    )


def first_wrong(detail: str) -> tuple[str, str, str] | None:
    """Where the first wrong element is, what it is and what it should be, as a check's answer names them."""
    found = _ELEMENT.search(detail)
    return (found[1], found[2], found[3].rstrip(",;")) if found else None


def _headline(results: Sequence[Result]) -> str:
    failed = sum(not r.ok for r in results)
    passed = sum(r.verdict == "PASS" for r in results)
    if not results:
        return "No case was run"
    if failed:
        return f"{failed} of {len(results)} cases fail"
    if not passed:
        return f"Nothing was judged: none of {len(results)} cases passed or failed"
    return (
        f"All {passed} cases pass" if passed == len(results) else f"{passed} of {len(results)} cases pass, none fails"
    )


def _rows(manifest: Manifest, results: Sequence[Result], scale: plots.Scale) -> list[OpRow]:
    groups: dict[tuple[str, str], list[tuple[int, Result]]] = {}
    for index, r in enumerate(results):
        groups.setdefault((r.op, r.backend), []).append((index, r))
    rows = []
    for (op, target), group in sorted(groups.items()):
        if lacks([r for _, r in group]):  # told among what is unsupported
            continue
        dots, height = plots.error_dots(group, scale)
        worst = max((r.worst for _, r in group if r.worst[0] is not None), default=(None, ""), key=_ratio)
        shares = sorted(
            s for _, r in group if r.verdict == "PASS" and (s := plots.of_limit(r, manifest.limits)) is not None
        )
        failed = [(i, r.case[len(op) :].strip("[]")) for i, r in group if not r.ok]
        counts = Counter(r.verdict for _, r in group)
        share = shares[len(shares) // 2] if shares else None
        rows.append(OpRow(op, target, counts, len(group), *worst, share, dots, height, failed))
    return rows


def _ratio(worst: tuple[float | None, str]) -> float:
    return worst[0] or 0.0


def _failures(results: Sequence[Result]) -> list[Failures]:
    groups: dict[tuple[str, ...], list[Failure]] = {}
    for index, r in enumerate(results):
        if not r.ok:
            key = (r.op, r.backend, r.verdict, r.code)
            groups.setdefault(key, []).append(Failure(index, r, first_wrong(r.detail)))
    return [Failures(group[0], group[1:]) for group in groups.values()]


def _unsupported(results: Sequence[Result]) -> list[Unsupported]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for r in results:
        if r.verdict == "UNSUPPORTED":
            groups.setdefault((r.code, r.detail, r.backend), []).append(r.case)
    found = [Unsupported(*key, tuple(ids)) for key, ids in groups.items()]
    return sorted(found, key=lambda u: (-len(u.cases), u.code, u.detail, u.target))
