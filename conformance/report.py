"""What a run shows on a terminal: how far it is, and at the end a table."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from glm5_hal.conformance.results import Result, lacks

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID


def table(results: Sequence[Result]) -> RenderableType:
    """Verdicts by op and kernel. "unsup" is UNSUPPORTED; "budget" is the largest error as a share of its budget."""
    from rich.box import SIMPLE
    from rich.table import Table

    shown = Table(box=SIMPLE, header_style="bold", pad_edge=False, collapse_padding=True)
    for column in ("op", "kernel"):
        shown.add_column(column, no_wrap=True)
    for column in ("pass", "fail", "unsup", "other", "budget", "s"):
        shown.add_column(column, justify="right", no_wrap=True)
    missing = Counter[str]()
    for (op, target), group in _grouped(results).items():
        if lacks(group):
            missing[target] += 1
            continue
        count = Counter(r.verdict for r in group)
        kernels = ", ".join(dict.fromkeys(r.kernel for r in group if r.kernel)) or target
        failed = count["FAIL"]
        other = len(group) - count["PASS"] - failed - count["UNSUPPORTED"]
        shown.add_row(
            op,
            kernels,
            str(count["PASS"]),
            f"[red]{failed}[/]" if failed else "0",
            str(count["UNSUPPORTED"]),
            f"[red]{other}[/]" if other else "0",
            _worst(group),
            f"{sum(r.seconds for r in group):.1f}",
        )
    shown.caption_justify = "left"
    shown.caption = "\n".join(f"{target} has no kernel of {n} ops: UNSUPPORTED there" for target, n in missing.items())
    return shown


def _grouped(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        groups.setdefault((r.op, r.backend), []).append(r)
    return groups


def _worst(group: Sequence[Result]) -> str:
    ratios = [ratio for r in group if (ratio := r.worst[0]) and ratio < float("inf")]
    return f"{max(ratios):.0%}" if ratios else "exact"


def verdict_line(results: Sequence[Result], waivers: str = "") -> str:
    """The run in one line, its waivers beside it."""
    count = Counter(r.verdict for r in results)
    parts = [f"{n} {verdict}" for verdict, n in count.most_common()]
    return f"{len(results)} cases: {', '.join(parts) or 'none'}" + (f"; {waivers}" if waivers else "")


#: Seconds between two lines of a run that is not watched on a terminal.
EVERY = 30.0


@contextmanager
def shown(total: int, done: int = 0) -> Iterator[Callable[[str, int], None]]:
    """Call the function with each result's case, and how many have failed so far: a live bar on stderr, or a plain line
    now and then where stderr is no terminal."""
    with progress(total, sys.stderr.isatty()) as bar:
        if bar:
            bar[0].update(bar[1], advance=done)
        last, count = time.monotonic(), done

        def note(case: str, failed: int) -> None:
            nonlocal last, count
            count += 1
            if bar:
                bar[0].update(bar[1], advance=1, description=f"{failed} failed  {case}")
            elif time.monotonic() - last >= EVERY:
                last = time.monotonic()
                sys.stderr.write(f"{count} of {total} judged, {failed} failed; last {case}\n")
                sys.stderr.flush()

        yield note


@contextmanager
def progress(total: int, show: bool) -> Iterator[tuple[Progress, TaskID] | None]:
    """A live bar on stderr, naming the case in hand."""
    if not show:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar, bar.add_task("starting", total=total)
