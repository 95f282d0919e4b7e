"""The report for people: a view of a bundle as Markdown, and as one HTML file that needs nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from glm5_hal.conformance.bundle import plots
from glm5_hal.conformance.bundle.view import MEANING, View
from glm5_hal.conformance.results import Result


def html(shown: View) -> str:
    return str(_environment(True).get_template("report.html.j2").render(v=shown, rows=_table(shown), data=_data(shown)))


def markdown(shown: View) -> str:
    return str(_environment(False).get_template("report.md.j2").render(v=shown))


@cache
def _environment(escape: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"percent": percent, "seconds": seconds, "cell": cell, "code": code, "ids": _ids}
    made.globals |= {"MEANING": MEANING, "si": plots.si}
    return made


def percent(share: float | None) -> str:
    """A share for people: two digits that count, "exact" where there is no error to speak of."""
    if share is None:
        return "–"
    if share == float("inf"):
        return "∞"
    if share >= 10:
        return f"{share:,.0f}×"
    return f"{share:.1f}×" if share > 2 else f"{100 * share:.0f} %" if share >= 0.01 else "<1 %" if share else "0 %"


def seconds(value: float) -> str:
    """A time for people."""
    if not value:
        return "–"
    return f"{value * 1e6:.0f} µs" if value < 1e-3 else f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.1f} s"


def cell(text: str) -> str:
    """Text in a Markdown table or list."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", one_line)


def code(text: str) -> str:
    """Text as Markdown's code, whatever it has in it."""
    one_line = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", one_line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {one_line} {fence}" if longest else f"`{one_line}`"


def _ids(cases: Iterable[str], most: int = 400) -> str:
    listed = list(cases)
    rest = f" … and {len(listed) - most} more" if len(listed) > most else ""
    return "  ".join(listed[:most]) + rest


@dataclass(frozen=True)
class _Row:
    result: Result
    ratio: float | None
    limit: float | None

    @property
    def rank(self) -> float:
        """Where the row sorts by error: what has no number is below all that have one."""
        return -1.0 if self.ratio is None else min(self.ratio, 1e30)


def _table(shown: View) -> list[_Row]:
    return [_Row(r, r.worst[0], plots.of_limit(r, shown.manifest.limits)) for r in shown.results]


def _data(shown: View) -> str:
    """What the page's script shows of a case on demand, as JSON that cannot end its element."""
    rows = [
        {
            "e": {k: [_short(v), _short(r.budget.get(k, 0.0))] for k, v in r.errors.items()},
            "c": {k: v for k, v in r.checks.items() if v != "ok"},
            "n": sum(v == "ok" for v in r.checks.values()),
            "d": r.detail,
            "k": r.kernel,
            "r": r.repro,
            "i": r.inputs,
            "w": r.waiver,
            "a": list(r.claims),
        }
        for r in shown.results
    ]
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _short(value: float) -> str:
    return f"{value:.3g}"
