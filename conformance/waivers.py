"""Failures that a backend knows of and excuses for a while: ``waivers.toml`` in the backend's package, nowhere else.

A waiver excuses one kind of failure, of named cases, on named devices and versions, until a date that is at most 90
days off. A failure that it covers is XFAIL. A pass that it covers is XPASS, which fails the run: the waiver is out of
date. What a kernel declares that it cannot do is UNSUPPORTED, and needs none.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from glm5_hal.conformance.globs import matches
from glm5_hal.conformance.results import Result
from glm5_hal.errors import HalError, shown, suggest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = "waivers.toml"

#: The failures that can be excused. ERROR and MISTRUSTED are the suite's own.
KINDS = ("FAIL", "CRASH", "HANG", "OOM")

#: How long a waiver may last.
LONGEST = timedelta(days=90)

#: What an entry must have, with an example of each. There is nothing else that it may have.
FIELDS: dict[str, str] = {
    "id": 'id = "norm-subnormals"',
    "cases": 'cases = ["rms_norm[bfloat16-*]"]',
    "kernels": 'kernels = ["acme:native"]',
    "kind": 'kind = "FAIL"',
    "reason": 'reason = "the vector unit flushes subnormals"',
    "issue": 'issue = "https://tracker.example/123"',
    "owner": 'owner = "numerics@acme.example"',
    "device": 'device = "ACME-1*"',
    "versions": 'versions = { driver = "<2.1" }',
    "since": "since = 2030-01-01",
    "expires": "expires = 2030-03-31",
}

_ID = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Waiver:
    """One excuse.

    Attributes:
        id: what results and reports call it.
        cases, kernels: globs over case ids and over "backend:provider".
        kind: the verdict that is excused, one of :data:`KINDS`.
        reason, issue, owner: why, where it is tracked (a link), and who sees to it.
        device: a glob over the device's name.
        versions: version ranges (PEP 440) by the names that the backend's probe reports; all must hold.
        since, expires: first and last day, in UTC.
    """

    id: str
    cases: tuple[str, ...]
    kernels: tuple[str, ...]
    kind: str
    reason: str
    issue: str
    owner: str
    device: str
    versions: Mapping[str, str]
    since: date
    expires: date

    def covers(self, result: Result) -> bool:
        return matches(result.case, self.cases) and matches(result.backend, self.kernels)

    def is_for(self, device: str, versions: Mapping[str, str]) -> bool:
        return matches(device, [self.device]) and all(
            _within(versions.get(name), wanted) for name, wanted in self.versions.items()
        )


@dataclass(frozen=True)
class Tally:
    """What became of a waiver in a run. ``status``: "used", "unused" (it matches no failure), "expired", "not yet" or
    "elsewhere" (it is for other devices or versions); ``excused`` and ``passed`` count its XFAIL and XPASS cases."""

    id: str
    status: str
    excused: int
    passed: int
    expires: str


@dataclass(frozen=True)
class Book:
    """The waivers of one backend, as they stand on one day on one device."""

    waivers: tuple[Waiver, ...] = ()
    day: date = field(default_factory=lambda: datetime.now(timezone.utc).date())
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    text: str = ""

    def status(self, waiver: Waiver) -> str:
        """ "" where it is in force."""
        if self.day > waiver.expires:
            return "expired"
        if self.day < waiver.since:
            return "not yet"
        return "" if waiver.is_for(self.device, self.versions) else "elsewhere"

    def judged(self, result: Result) -> Result:
        """The result with its excuse, if it has one."""
        mine = [w for w in self.waivers if not self.status(w) and w.covers(result)]
        for waiver in mine:
            if result.verdict == waiver.kind:
                return replace(result, verdict="XFAIL", waiver=waiver.id)
        if mine and result.verdict == "PASS":
            detail = f"passes, and waiver {mine[0].id} expects {mine[0].kind}: take it out of {FILE}"
            return replace(result, verdict="XPASS", waiver=mine[0].id, detail=detail)
        return result

    def unexcused(self, result: Result) -> Result:
        """The result as it was before `judged`. Raises KeyError for a waiver that is not in the book."""
        if not result.waiver:
            return result
        kind = {w.id: w.kind for w in self.waivers}[result.waiver]
        passed = result.verdict == "XPASS"
        return replace(result, verdict="PASS" if passed else kind, waiver="", detail="" if passed else result.detail)

    def tally(self, results: Iterable[Result]) -> tuple[Tally, ...]:
        used = [(r.waiver, r.verdict) for r in results if r.waiver]
        rows = []
        for w in self.waivers:
            excused, passed = used.count((w.id, "XFAIL")), used.count((w.id, "XPASS"))
            status = self.status(w) or ("used" if excused or passed else "unused")
            rows.append(Tally(w.id, status, excused, passed, w.expires.isoformat()))
        return tuple(rows)


def shipped(backend: str) -> tuple[str, str]:
    """The file of waivers in a backend's package, and its text; ("", "") where there is none.

    To be asked where the backend is loaded, which is in a worker: finding a module imports what it lies in.
    """
    from glm5_hal import context

    record = context.catalogue().record(backend)
    module = sys.modules.get(record.value.partition(":")[0].strip())
    if module is None or not module.__file__:
        return "", ""
    file = Path(module.__file__).with_name(FILE)
    return (str(file), file.read_text(encoding="utf-8")) if file.is_file() else ("", "")


def book(shipped: tuple[str, str], device: str, versions: Mapping[str, str]) -> Book:
    """The waivers that a backend ships, for a device as its probe found it. Raises HalError("CONFIG") for a file that
    breaks a rule."""
    file, text = shipped
    return Book(parse(text, file), device=device, versions=versions, text=text)


def parse(text: str, file: str = FILE) -> tuple[Waiver, ...]:
    """The waivers of a file's text. Raises HalError("CONFIG") that names file, entry and fix for whatever is amiss."""
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise HalError("CONFIG", f"{file}: {problem}", value=file, fix="mend the TOML") from None
    strange = read.keys() - {"waiver"}
    entries = read.get("waiver", [])
    if strange or not isinstance(entries, list):
        what = f"knows nothing of {', '.join(sorted(strange))}" if strange else "`waiver` is no array of tables"
        raise HalError("CONFIG", f"{file} {what}", value=file, fix="begin each entry with [[waiver]]")
    found: list[Waiver] = []
    for number, entry in enumerate(entries, 1):
        waiver = _waiver(entry, f"{file}: waiver {number}")
        if waiver.id in {w.id for w in found}:
            raise _bad(f"{file}: waiver {number}", "id", waiver.id, "is the id of two waivers", "choose another")
        found.append(waiver)
    return tuple(found)


def _waiver(entry: Any, where: str) -> Waiver:
    if not isinstance(entry, dict):
        raise HalError("CONFIG", f"{where} is no table", value=entry, fix="begin each entry with [[waiver]]")
    if isinstance(entry.get("id"), str):
        where = f"{where} ({entry['id']})"
    for name in entry.keys() - FIELDS.keys():
        raise HalError("CONFIG", f"{where} has a field {name!r}", value=name, fix=suggest(name, FIELDS))
    for name, example in FIELDS.items():
        if name not in entry:
            raise HalError("CONFIG", f"{where} has no {name}", value=name, fix=f"add, for example: {example}")
    for name, value in entry.items():
        problem = _PROBLEM[name](value)
        if problem:
            raise _bad(where, name, value, problem, f"for example: {FIELDS[name]}")
    since, expires = entry["since"], entry["expires"]
    if not since <= expires <= since + LONGEST:
        last = since + LONGEST
        raise _bad(
            where, "expires", expires.isoformat(), f"is not within {LONGEST.days} days of since", f"{last} at most"
        )
    lists = {name: tuple(entry[name]) for name in ("cases", "kernels")}
    return Waiver(**{**entry, **lists})


def _bad(where: str, name: str, value: Any, problem: str, fix: str) -> HalError:
    return HalError("CONFIG", f"{where}: {name} = {shown(value)} {problem}", value=value, fix=fix)


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else "is no text"


def _globs(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return "is no list of globs"
    return "" if all(isinstance(v, str) and v.strip() for v in value) else "has something else than globs in it"


def _day(value: Any) -> str:
    return "" if isinstance(value, date) and not isinstance(value, datetime) else "is no date"


def _versions(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return "names no version"
    return "" if all(isinstance(v, str) and _range(v) is not None for v in value.values()) else "has no version range"


_PROBLEM = dict.fromkeys(FIELDS, _text) | {
    "id": lambda v: "" if isinstance(v, str) and _ID.fullmatch(v) else "is not of lower-case letters, digits and '-'",
    "cases": _globs,
    "kernels": _globs,
    "kind": lambda v: "" if v in KINDS else f"is not one of {', '.join(KINDS)}",
    "issue": lambda v: "" if isinstance(v, str) and re.match(r"https?://\S+$", v) else "is no link",
    "versions": _versions,
    "since": _day,
    "expires": _day,
}


def _range(text: str) -> Any:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(text) if text.strip() else None
    except InvalidSpecifier:
        return None


def _within(version: str | None, wanted: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        return version is not None and _range(wanted).contains(Version(version), prereleases=True)
    except InvalidVersion:  # a version that cannot be compared is not known to be in the range
        return False


def counted(tallies: Sequence[Tally]) -> str:
    """The waivers in words, for beside a summary; "" where there are none."""
    if not tallies:
        return ""
    excused = sum(t.excused for t in tallies)
    idle = {s: sum(t.status == s for t in tallies) for s in ("unused", "expired", "not yet", "elsewhere")}
    rest = "".join(f", {n} {status}" for status, n in idle.items() if n)
    return f"{len(tallies)} waiver{'s' * (len(tallies) > 1)}, {excused} case{'s' * (excused != 1)} excused{rest}"
