"""What the sampled calls say, op by op, the most suspicious first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from glm5_hal.errors import HalError

if TYPE_CHECKING:
    from rich.console import RenderableType


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a shadow file. Raises HalError("CONFIG") where it is not there or a line is not one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        fix = "run the model with GLM5_SHADOW='*:0.01' first, or name the file that it wrote"
        raise HalError("CONFIG", f"no shadow file: {problem}", value=str(path), fix=fix) from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({"op": str(record["op"]), "kernel": str(record["kernel"]), **record})
        except (ValueError, KeyError, TypeError):
            what = f"{path}, line {number} is no record of a sampled call"
            raise HalError("CONFIG", what, value=line[:80], fix="name a file that GLM5_SHADOW wrote") from None
    return records


def ranked(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per op and kernel: calls judged, how many failed, the worst and the median excess (the largest error as a
    share of its budget), the worst call's shapes. Those that fail come first, then by worst excess."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["op"], record["kernel"]), []).append(record)
    rows = [_row(op, kernel, group) for (op, kernel), group in groups.items()]
    return sorted(rows, key=lambda row: (-row["failed"], -_number(row["worst"]), row["op"]))


def _row(op: str, kernel: str, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told = [r for r in group if "skipped" not in r and r["proves"]]
    worst = max(told, key=lambda r: (not r["ok"], _number(r["excess"])), default=None)
    skipped = [str(r["skipped"]) for r in group if "skipped" in r]
    return {
        "op": op,
        "kernel": kernel,
        "judged": len(told),
        "failed": sum(not r["ok"] for r in told),
        "worst": worst["excess"] if worst else 0.0,
        "median": _spelled(median(_number(r["excess"]) for r in told)) if told else 0.0,
        "criterion": worst["criterion"] if worst else "",
        "detail": worst["detail"] if worst else "",
        "signature": worst["signature"] if worst else "",
        "skipped": len(skipped),
        "why_skipped": max(set(skipped), key=skipped.count, default=""),
        "proves_nothing": len(group) - len(told) - len(skipped),
    }


def _number(value: Any) -> float:
    return float(value)


def _spelled(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """ "worst" and "median" are a call's largest error as a share of its budget; "in" is where it is."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE, header_style="bold", pad_edge=False, collapse_padding=True)
    for column in ("op", "kernel"):
        shown.add_column(column, no_wrap=True)
    for column in ("judged", "failed", "worst", "median", "skipped"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("in")
    for row in rows:
        failed = Text(str(row["failed"]), "red" if row["failed"] else "")
        shares = [_share(_number(row[k])) for k in ("worst", "median")]
        shown.add_row(
            row["op"], row["kernel"], str(row["judged"]), failed, *shares, str(row["skipped"]), row["criterion"]
        )
    return shown


def _share(of_budget: float) -> str:
    return f"{of_budget:.0%}" if of_budget < 10 else f"{of_budget:.0f}x" if of_budget < 1e4 else ">9999x"


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a table has no room for: the worst call of each op that was wrong, and why calls were skipped."""
    wrong = [f"{r['op']} on {r['kernel']}: {r['detail']}\n    {r['signature']}" for r in rows if r["failed"]]
    missed = [f"{r['op']}: {r['skipped']} not judged: {r['why_skipped']}" for r in rows if r["skipped"]]
    return wrong + missed
