"""``glm5-hal conformance selftest``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from glm5_hal.conformance.mutants.selftest import Report


def selftest(
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Only ops that match this glob; may be repeated.")
    ] = None,
    level: Annotated[str, typer.Option(help="quick (a fixed sample of the mutants, two draws) or full.")] = "full",
    seeds: Annotated[
        int | None, typer.Option(help="Draws that honest kernels are judged on: 20, or 2 if quick.", min=0)
    ] = None,
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Go on after the first failure of a mutant, and write kill-matrix.md to OUT."),
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds after which a case hangs.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="Folder for selftest.json and kill-matrix.md.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Judge the suite itself: every wrong kernel must fail it, every honest one must pass.

    Runs on the CPU. Exit codes: 0 all mutants killed and no false alarm, 1 not so, 2 usage.
    """
    from glm5_hal.conformance import report as reports
    from glm5_hal.conformance.mutants import matrix as matrices
    from glm5_hal.conformance.mutants import selftest as tests

    with reports.progress(1, not as_json and sys.stderr.isatty()) as bar:

        def show(done: int, total: int, what: str) -> None:
            if bar:
                bar[0].update(bar[1], completed=done, total=total, description=what)

        report = tests.run(op or ("*",), level, seeds, matrix, workers, timeout, show)
    found = report.as_dict()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if matrix:
            (out / "kill-matrix.md").write_text(matrices.page(report), encoding="utf-8")
        else:
            (out / "selftest.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(report)
    raise typer.Exit(0 if report.ok else 1)


def _print(report: Report) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(box=SIMPLE, header_style="bold", pad_edge=False)
    table.add_column("check", no_wrap=True)
    for column in ("fails", "alone"):
        table.add_column(column, justify="right")
    marginal = report.marginal()
    for check, row in {**{check: {} for check in marginal}, **report.matrix()}.items():
        table.add_row(check, str(sum(row.values())), str(len(marginal.get(check, ()))))
    console.print(table)
    for title, status in (("survived", "survived"), ("no equivalent", "wrongly argued"), ("the suite failed", "error")):
        for outcome in report.of(status):
            console.print(f"[red]{title}[/]  ", end="")
            console.print(f"{outcome.mutant.id}  {outcome.case} {outcome.detail}", markup=False, highlight=False)
    for kind, lines in (("stale argument", report.stale), ("false alarm", report.alarms)):
        for line in lines:
            console.print(f"[red]{kind}[/]  ", end="")
            console.print(line, markup=False, highlight=False)
    count = {status: len(report.of(status)) for status in ("killed", "equivalent", "not executed", "pending")}
    console.print(
        f"{count['killed']} of {report.mutants} mutants killed; {count['equivalent']} equivalent, "
        f"{count['not executed']} not executed here, {count['pending']} out of a run's reach. "
        f"{len(report.alarms)} false alarms in {report.honest['cases']} cases of {report.honest['kernels']} honest "
        f"kernels on {report.honest['seeds']} draws.",
        markup=False,
        highlight=False,
    )
