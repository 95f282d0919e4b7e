"""The files of a bundle: written at the end of a run, and read back.

``results.jsonl`` and ``manifest.json`` are the truth; JUnit, Markdown and HTML are derived from them and from nothing
else, so that whoever has the two can derive them again and compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_hal.conformance import profiles
from glm5_hal.conformance.bundle import junit, page
from glm5_hal.conformance.bundle.manifest import Manifest, Selection, day_of, describe
from glm5_hal.conformance.bundle.view import view
from glm5_hal.conformance.folder import BUNDLE
from glm5_hal.conformance.results import Result, from_record
from glm5_hal.conformance.waivers import FILE as WAIVERS
from glm5_hal.conformance.waivers import Book, parse
from glm5_hal.errors import HalError

if TYPE_CHECKING:
    from glm5_hal.conformance.target import Target

RESULTS, MANIFEST, SUMS = "results.jsonl", "manifest.json", "SHA256SUMS"

#: Everything that a bundle consists of.
NAMES = BUNDLE


@dataclass(frozen=True)
class Bundle:
    """A bundle's content, read and well formed."""

    manifest: Manifest
    results: tuple[Result, ...]
    book: Book


def write(
    folder: Path,
    results: Sequence[Result],
    selection: Selection,
    cases: Sequence[str],
    judged: Sequence[Target],
    book: Book,
    times: tuple[str, str],
) -> Manifest:
    """Complete ``folder``, which has results.jsonl already, to a bundle. ``times``: when the run started, and ended."""
    said = describe(selection, cases, judged, results, book)
    manifest = Manifest(**said, started=times[0], ended=times[1], results=sha256(folder / RESULTS))
    text = json.dumps(manifest.as_dict(), indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    (folder / WAIVERS).write_text(book.text, encoding="utf-8", newline="\n")
    for name, content in derived(Bundle(manifest, tuple(results), book)).items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
    seal(folder)
    return manifest


def derived(bundle: Bundle) -> dict[str, str]:
    """The derived files' content by name."""
    shown = view(bundle.manifest, bundle.results, bundle.book, profiles.claims(bundle.manifest, bundle.results))
    return {
        "junit.xml": junit.junit(bundle.results),
        "report.md": page.markdown(shown),
        "report.html": page.html(shown),
    }


def seal(folder: Path) -> None:
    """Write SHA256SUMS over the bundle's files, as `sha256sum -c` reads it."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(NAMES) if name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def resum(folder: Path, names: Iterable[str]) -> None:
    """Renew the lines of some files in SHA256SUMS. The others stay as they are: what was edited still shows."""
    lines = dict.fromkeys(names, "")
    if (folder / SUMS).is_file():
        text = (folder / SUMS).read_text(encoding="utf-8")
        lines = {line.partition("  ")[2]: line.partition("  ")[0] for line in text.splitlines()} | lines
    lines |= {name: sha256(folder / name) for name in names}
    content = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines.items()))
    (folder / SUMS).write_text(content, encoding="utf-8", newline="\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Malformed(Exception):  # noqa: N818 - on its way into a finding or a HalError
    """A file of a bundle that cannot be read, and why."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"{file}: {why}")
        self.file, self.why = file, why


def read(folder: Path) -> Bundle:
    """The content of a bundle, unverified. Raises Malformed."""
    try:
        manifest = Manifest.from_dict(json.loads(_text(folder, MANIFEST)))
    except (ValueError, RecursionError) as problem:
        raise Malformed(MANIFEST, str(problem)) from None
    lines = _text(folder, RESULTS).removesuffix("\n")  # not splitlines: what kernels say may have U+2028 in it
    results = tuple(_result(line, n) for n, line in enumerate(lines.split("\n") if lines else [], 1))
    text = _text(folder, WAIVERS)
    try:
        waivers = parse(text)
        return Bundle(manifest, results, book_of(manifest, waivers, text))
    except HalError as problem:
        raise Malformed(WAIVERS, problem.what) from None


def book_of(manifest: Manifest, waivers: Any, text: str) -> Book:
    return Book(waivers, day_of(manifest.ended), manifest.device.name, manifest.device.versions, text)


def opened(folder: Path) -> Bundle:
    """`read` for a command. Raises HalError("CONFIG")."""
    if not folder.is_dir():
        raise HalError("CONFIG", f"{folder} is no folder", value=str(folder), fix="name the --out of a run")
    try:
        return read(folder)
    except Malformed as problem:
        fix = "`glm5-hal conformance run --out` writes a bundle"
        raise HalError("CONFIG", f"{folder}: {problem}", value=str(folder), fix=fix) from None


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        why = problem.strerror or "cannot be read" if isinstance(problem, OSError) else "is not UTF-8"
        raise Malformed(name, why) from None


def _result(line: str, number: int) -> Result:
    try:
        return from_record(json.loads(line))
    except (ValueError, RecursionError) as problem:
        raise Malformed(RESULTS, f"line {number}: {problem}") from None
