"""Whether a bundle holds together: files, suite, cases, numbers and verdicts, offline.

A bundle is not signed, so this proves that it is consistent, and nothing more: whoever can write all of it can make it
consistent. `rerun` goes further, because it computes cases again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timezone
from pathlib import Path

from glm5_hal.backend import EVIDENCE
from glm5_hal.conformance.bundle import files, rules
from glm5_hal.conformance.bundle.files import MANIFEST, NAMES, RESULTS, SUMS, Bundle, Malformed
from glm5_hal.conformance.bundle.fingerprint import combined, spec_hashes, suite
from glm5_hal.conformance.bundle.manifest import Manifest, case_list
from glm5_hal.conformance.cases import Case, cases, find
from glm5_hal.conformance.folder import RUN
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.waivers import FILE as WAIVERS
from glm5_hal.conformance.waivers import Tally
from glm5_hal.errors import HalError

#: What may be wrong with a bundle.
CODES: dict[str, str] = {
    "MISSING": "a file is not there",
    "ADDED": "a file is there that belongs to no bundle",
    "EDITED": "a file is not the one that was summed",
    "MALFORMED": "a file cannot be read",
    "DIRTY": "the suite had changes that nobody else has, or nobody knows which suite it was",
    "SUITE": "another suite made the bundle; this one cannot judge it",
    "SPEC": "the spec hash is not that of this suite",
    "WAIVER": "a waiver had expired, or has since and is relied on",
    "CASES": "a case is missing, there twice, or not known",
    "COUNTS": "counts do not add up",
    "VERDICT": "a verdict does not follow from what was recorded",
    "RECORD": "a result contradicts the manifest or its own case",
    "EVIDENCE": "the evidence is stronger than the device allows",
    "DERIVED": "a derived file does not follow from results and manifest",
    "RERUN": "a case that was computed again gave something else",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a code of :data:`CODES`, the file or case, and what."""

    code: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.code}  {self.where}: {self.what}"


def verify(folder: Path, today: date | None = None) -> tuple[list[Problem], Bundle | None]:
    """Everything that is wrong, and the bundle if it could be read. Nothing is run. ``today`` in UTC."""
    problems = list(_sums(folder))
    try:
        bundle = files.read(folder)
    except Malformed as broken:
        if not any(p.where == broken.file and p.code == "MISSING" for p in problems):
            problems.append(Problem("MALFORMED", broken.file, broken.why))
        return problems, None
    problems += _suite(bundle.manifest)
    problems += _waivers(bundle, today or datetime.now(timezone.utc).date())
    problems += _cases(bundle)
    problems += _manifest(bundle, folder)
    problems += _results(bundle)
    problems += _derived(bundle, folder)
    return problems, bundle


# --- files -----------------------------------------------------------------------------------------------------------


def _sums(folder: Path) -> Iterator[Problem]:
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    for name in sorted(set(NAMES) - there):
        yield Problem("MISSING", name, "is part of every bundle and not there")
    for name in sorted(there - {*NAMES, RUN}):
        yield Problem("ADDED", name, "is part of no bundle")
    if SUMS not in there:
        return
    summed: dict[str, str] = {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if name in summed or name not in NAMES or name == SUMS:
            yield Problem("MALFORMED", SUMS, f"the line {line[:100]!r} does not belong there")
        summed[name] = digest
    for name in sorted(set(NAMES) - {SUMS}):
        if name not in summed:
            yield Problem("MALFORMED", SUMS, f"does not list {name}")
        elif name in there and files.sha256(folder / name) != summed[name]:
            yield Problem("EDITED", name, f"its sha256 is not the one in {SUMS}")


# --- the run ---------------------------------------------------------------------------------------------------------


def _suite(manifest: Manifest) -> Iterator[Problem]:
    theirs, ours = manifest.suite, suite()
    if not theirs.clean:
        why = "had changes that are not committed or released" if theirs.origin != "unknown" else "is not known"
        yield Problem("DIRTY", MANIFEST, f"the suite that judged {why}")
    if theirs.version != ours.version:
        what = f"made by suite {theirs.version}, and this is {ours.version}: verify with that version"
        yield Problem("SUITE", MANIFEST, what)
    elif theirs.code != ours.code and (theirs.clean or theirs.commit != ours.commit):
        at = f"commit {theirs.commit[:12]}" if theirs.commit else "another build"
        yield Problem("SUITE", MANIFEST, f"made by {at} of suite {theirs.version}, whose code is not this one's")
    mine = spec_hashes()
    if combined(manifest.specs) != manifest.spec:
        yield Problem("SPEC", MANIFEST, "the spec hash is not that of the ops' hashes")
    other = sorted(op for op in mine.keys() | manifest.specs.keys() if mine.get(op) != manifest.specs.get(op))
    if other or manifest.spec != combined(mine):
        yield Problem("SPEC", MANIFEST, f"the spec hash of this suite version is another: {', '.join(other) or 'all'}")


def _waivers(bundle: Bundle, today: date) -> Iterator[Problem]:
    relied = {r.waiver for r in bundle.results if r.verdict == "XFAIL"}
    for waiver in bundle.book.waivers:
        if waiver.expires < bundle.book.day:
            yield Problem("WAIVER", WAIVERS, f"{waiver.id} had expired on {waiver.expires}, before the run ended")
        elif waiver.expires < today and waiver.id in relied:
            yield Problem("WAIVER", WAIVERS, f"{waiver.id} has expired on {waiver.expires}, and cases rely on it")


def expected(manifest: Manifest) -> list[Case]:
    """The cases that a run of this selection has. Raises HalError for a selection that this suite does not know."""
    asked = manifest.selection
    return find(asked.cases) if asked.cases else list(cases(asked.level, asked.ops))


def _cases(bundle: Bundle) -> Iterator[Problem]:
    selection = bundle.manifest.selection
    try:
        known = {case.id: case for case in expected(bundle.manifest)}
    except HalError as unknown:
        yield Problem("CASES", MANIFEST, f"its selection is not known here: {unknown.what}")
        return
    if case_list(known) != bundle.manifest.case_list:
        yield Problem("CASES", MANIFEST, "the hash of the case list is not that of its selection")
    wanted = {(case, target) for case in known for target in selection.targets}
    found = Counter((r.case, r.backend) for r in bundle.results)
    yield from (Problem("CASES", c, f"is missing on {t}") for c, t in sorted(wanted - found.keys()))
    yield from (Problem("CASES", c, f"was not asked for on {t}") for c, t in sorted(found.keys() - wanted))
    yield from (Problem("CASES", c, f"is there {n} times on {t}") for (c, t), n in sorted(found.items()) if n > 1)
    for r in bundle.results:
        if r.case in known:
            for problem in rules.of_its_case(r, known[r.case]):
                yield Problem("RECORD", r.case, problem)


def _manifest(bundle: Bundle, folder: Path) -> Iterator[Problem]:
    said = bundle.manifest
    counts = dict(Counter(r.verdict for r in bundle.results))
    if dict(said.counts) != counts:
        yield Problem("COUNTS", MANIFEST, f"counts {dict(said.counts)}, the results are {counts}")
    if said.cases != len(bundle.results):
        yield Problem("COUNTS", MANIFEST, f"says {said.cases} cases, there are {len(bundle.results)}")
    if said.results != files.sha256(folder / RESULTS):
        yield Problem("EDITED", RESULTS, "its sha256 is not the one in the manifest")
    tallies = bundle.book.tally(bundle.results)
    if said.waivers != tallies:
        yield Problem("COUNTS", MANIFEST, f"waivers {_told(said.waivers)}, they are {_told(tallies)}")
    if datetime.fromisoformat(said.ended) < datetime.fromisoformat(said.started):
        yield Problem("RECORD", MANIFEST, "the run ends before it starts")
    for problem in rules.of_the_device(said):
        yield Problem("EVIDENCE", MANIFEST, problem)


def _told(tallies: Sequence[Tally]) -> str:
    return str([tuple(asdict(t).values()) for t in tallies])


def _results(bundle: Bundle) -> Iterator[Problem]:
    said = bundle.manifest
    failed = {f"{r.case} on {r.backend}" for r in bundle.results if r.verdict not in ("PASS", "UNSUPPORTED")}
    for r in bundle.results:
        for problem in _contradictions(r, said):
            yield Problem("RECORD", r.case, problem)
        if r.evidence not in EVIDENCE or EVIDENCE.index(r.evidence) < EVIDENCE.index(said.device.evidence):
            yield Problem("EVIDENCE", r.case, f"claims {r.evidence}, the device gives {said.device.evidence}")
        for problem in (*rules.of_the_verdict(r, bundle.book), *rules.of_the_culprit(r, failed)):
            yield Problem("VERDICT", r.case, problem)


def _contradictions(r: Result, said: Manifest) -> Iterator[str]:
    pairs: Mapping[str, tuple[object, object]] = {
        "seed": (r.seed, said.selection.seed),
        "device": (r.device, said.device.name),
        "evidence": (r.evidence, said.device.evidence),
    }
    for name, (mine, theirs) in pairs.items():
        if mine != theirs:
            yield f"{name} is {mine!r}, the manifest says {theirs!r}"
    words = (f"--backend {r.backend} ", f"--case '{r.case}'", f"--seed {r.seed}")
    if not all(word in f"{r.repro} " for word in words):
        yield "the command to run it again does not run it again"


def _derived(bundle: Bundle, folder: Path) -> Iterator[Problem]:
    for name, content in files.derived(bundle).items():
        path = folder / name
        if path.is_file() and path.read_bytes() != content.encode():
            yield Problem("DERIVED", name, _first_difference(path.read_text("utf-8", "replace"), content))


def _first_difference(found: str, wanted: str) -> str:
    has, should = found.splitlines(), wanted.splitlines()
    for number, (a, b) in enumerate(zip(has, should, strict=False), 1):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            near = slice(max(at - 20, 0), at + 40)
            return f"line {number} has {a[near]!r} where the results give {b[near]!r}"
    return f"has {len(has)} lines, the results give {len(should)}"
