"""Compile every Triton kernel ahead of time for chips that are not here, and hold it to its budgets.

    python ci/triton_compile.py [--target 'sm_*'] [--op '*mla*'] [--dtype bfloat16] [--json] [--jobs 2]

Each op is called with GLM-5's shapes in every activation dtype and cache format, with the block sizes of each chip. It
shows that the kernels compile, fit the chip and do not spill: evidence "compiled". That the numbers are right is shown
by the interpreter; that it is fast, by nothing here. Exit codes: 0 all gates hold, 1 one is broken, 2 usage.

What is compiled is kept in TRITON_CACHE_DIR if that is set, so that a second run compiles only what has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import triton_budgets
import triton_workers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from triton_budgets import Budgets
from triton_workers import DTYPES, Found, Unit

from glm5_hal.ops import names


def main() -> int:
    args = _arguments()
    os.environ.pop("TRITON_INTERPRET", None)  # a process either interprets or compiles
    try:
        budgets = triton_budgets.read(args.budgets)
    except (OSError, ValueError) as problem:
        return _usage(str(problem))
    if find_spec("triton") is None:
        return _usage("Triton is not installed: pip install triton")
    targets = tuple(t for t in budgets.targets.values() if _any(t.name, args.target))
    ops = [op for op in names() if _any(op, args.op)]
    if not targets or not ops:
        return _usage(f"nothing is called that; there are {', '.join(names() if targets else budgets.targets)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="glm5-hal-triton-") as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        found = _gathered([Unit(op, dtype, targets) for op in ops for dtype in args.dtype or DTYPES], args.jobs)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    head = {
        "evidence": "compiled",
        "triton": found.triton,
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(spent.ru_utime + spent.ru_stime, 1),
    }
    problems = broken_gates(found, budgets, args)
    if args.json:
        print(json.dumps({**head, "kernels": found.kernels, "problems": problems}, indent=2))
    else:
        _show(found, [target.name for target in targets], problems, head)
    return 1 if problems else 0


def broken_gates(found: Found, budgets: Budgets, args: argparse.Namespace) -> list[str]:
    """In words."""
    idle = [
        f"{target}: {op} of provider {provider} takes none of GLM-5's calls"
        for (target, op, provider), taken in found.taken.items()
        if not taken and not args.dtype
    ]
    whole = not (args.target or args.op or args.dtype)
    return [*found.failures, *idle, *triton_budgets.broken(budgets, found.kernels, whole=whole)]


def _gathered(units: Sequence[Unit], jobs: int) -> Found:
    whole = Found()
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(units))
        for found in triton_workers.gather(triton_workers.compiled, units, jobs):
            whole.add(found)
            progress.advance(task)
    whole.kernels.sort(key=lambda kernel: [kernel[name] for name in ("op", "kernel", "dtype", "target", "call")])
    return whole


def _show(found: Found, targets: Sequence[str], problems: Sequence[str], head: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if found.kernels:
        console.print(table(found.kernels, targets))
    for problem in problems:
        console.print(Text(problem, style="red"))
    if crashes := sum(kernel["crashes"] for kernel in found.kernels):
        console.print(f"the compiler crashed {crashes} times, and compiled when it was run again", style="yellow")
    took = f"in {head['seconds']:.0f} s ({head['cpu_seconds']:.0f} s of CPU)"
    done = f"{len(found.kernels)} forms of kernels from {sum(found.taken.values())} calls {took}"
    console.print(f"evidence compiled, Triton {head['triton']}: {done}; {len(problems) or 'no'} broken gates")


def table(kernels: Sequence[dict[str, Any]], targets: Sequence[str]) -> Table:
    """One row for each op, kernel and dtype: the most that any of its compiled forms needs, target by target."""
    measured = any(kernel["registers"] for kernel in kernels)
    title = "registers of a thread, shared memory of a program" if measured else None
    made = Table(title=title, title_justify="left")
    for name in ("op", "kernel", "dtype"):
        made.add_column(name, overflow="fold")
    made.add_column("forms", justify="right")
    for target in targets:
        made.add_column(target, justify="right", no_wrap=True)

    def row(kernel: dict[str, Any]) -> tuple[str, ...]:
        return kernel["op"], kernel["kernel"], kernel["dtype"]

    for key, group in groupby(sorted(kernels, key=row), row):
        forms = list(group)
        by_target = [[form for form in forms if form["target"] == target] for target in targets]
        made.add_row(*key, str(max(map(len, by_target))), *map(_cell, by_target))
    return made


def _cell(forms: Sequence[dict[str, Any]]) -> Text:
    if not forms:
        return Text("-", style="dim")
    if any(form["problem"] for form in forms):
        return Text("fails", style="bold red")
    registers, spilled, shared = (max(form[name] for form in forms) for name in ("registers", "spilled", "shared"))
    text = Text(f"{registers} {shared / 1024:.1f}K" if registers else "ok")
    return text.append(f" {spilled} spilled", style="bold red") if spilled else text


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", help="chips, as globs; all of the budgets if left out")
    parser.add_argument("--op", action="append", help="ops, as globs")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--budgets", type=Path, default=triton_budgets.FILE, help="another file of chips and gates")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    return parser.parse_args()


def _any(name: str, globs: Sequence[str] | None) -> bool:
    return not globs or any(fnmatchcase(name, glob) for glob in globs)


def _usage(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
