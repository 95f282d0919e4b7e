"""The gate on excuses: every waivers.toml of this repository is well formed, names cases that exist, and is in date.

python ci/waivers.py    exit 1 and say which entry is not
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, timezone
from pathlib import Path

from glm5_hal.conformance.cases import cases
from glm5_hal.conformance.globs import matches
from glm5_hal.conformance.waivers import FILE, parse
from glm5_hal.errors import HalError

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    today = datetime.now(timezone.utc).date()
    problems = [problem for file in files() for problem in check(file, today)]
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def files() -> list[Path]:
    return sorted([*ROOT.glob(f"backends/*/{FILE}"), *ROOT.glob(f"examples/**/{FILE}")])


def check(file: Path, today: date) -> Iterator[str]:
    """What is wrong with a file, in words."""
    try:
        waivers = parse(file.read_text(encoding="utf-8"), str(file))
    except HalError as problem:
        yield str(problem)
        return
    known = [case.id for case in cases("full")]
    for waiver in waivers:
        if today > waiver.expires:
            yield f"{file}: waiver {waiver.id} expired on {waiver.expires}: repair the kernel; ask {waiver.owner}"
        for pattern in waiver.cases:
            if not any(matches(case, [pattern]) for case in known):
                yield f"{file}: waiver {waiver.id}: no case matches {pattern!r}"


if __name__ == "__main__":
    raise SystemExit(main())
