"""``glm5-hal conformance``: run the suite, list its cases, judge the suite itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glm5_hal.conformance.mutants.cli import selftest

if TYPE_CHECKING:
    from glm5_hal.conformance.cases import Case
    from glm5_hal.conformance.results import Result
    from glm5_hal.conformance.runner import Target

app = typer.Typer(no_args_is_help=True, help="Judge a backend's kernels against the float64 oracle.")

Level = Annotated[str, typer.Option(help="smoke (small shapes), standard (GLM-5's real widths) or full.")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="Only ops that match this glob. May be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
def run(
    backend: Annotated[
        str, typer.Option(help="B or B:provider. B alone judges every provider of the backend.")
    ] = "cpu",
    level: Level = "smoke",
    op: Ops = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case, whatever its level. May be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="Device to run on, as torch names it (cuda:1).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs; a customer may choose a fresh one.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl and junit.xml.")] = Path("conformance-out"),
    as_json: Json = False,
) -> None:
    """Run the cases and write OUT/results.jsonl and OUT/junit.xml.

    Exit codes: 0 all passed (UNSUPPORTED is not a failure, but something must pass), 1 a case failed, 2 usage, 3 the
    device is not available.
    """
    from glm5_hal.conformance import cases as all_cases
    from glm5_hal.conformance import runner
    from glm5_hal.conformance.results import succeeded

    judged = runner.targets(backend, device)
    chosen = all_cases.find(case) if case else list(all_cases.cases(level, op or ("*",)))
    results = _run(chosen, judged, seed, out, show=not as_json)
    _print(results, out, as_json)
    raise typer.Exit(0 if succeeded(results) else 1)


def _run(chosen: list[Case], judged: list[Target], seed: int, out: Path, *, show: bool) -> list[Result]:
    import torch

    from glm5_hal.conformance import report, runner
    from glm5_hal.errors import HalError

    if all(c.sample.level == "smoke" for c in chosen):
        torch.set_num_threads(1)  # tiny tensors gain nothing from threads, and stall in them on a busy machine
    results = []
    try:
        total, visible = len(chosen) * len(judged), show and sys.stderr.isatty()
        with report.sink(out) as lines, report.progress(total, visible) as bar, report.kernels_print_to_stderr():
            for result in runner.run(chosen, judged, seed):
                lines.write(result.as_json() + "\n")
                lines.flush()
                results.append(result)
                if bar:
                    failed = sum(not r.ok for r in results)
                    bar[0].update(bar[1], advance=1, description=f"{failed} failed  {result.case}")
        report.write_junit(results, out / "junit.xml")
    except OSError as problem:
        raise HalError(
            "CONFIG", f"cannot write to {out}: {problem}", value=str(out), fix="choose another --out"
        ) from None
    return results


def _print(results: list[Result], out: Path, as_json: bool) -> None:
    from rich.console import Console

    from glm5_hal.conformance import report
    from glm5_hal.conformance.results import summary

    if as_json:
        typer.echo(json.dumps({**summary(results), "out": str(out)}, indent=2))
        return
    console = Console()
    console.print(report.table(results))
    for r in (r for r in results if not r.ok):
        console.print(f"[red]{r.verdict}[/]  {r.kernel or r.backend}  ", end="")
        console.print(f"{r.case}  {r.detail}\n      {r.repro}", markup=False, highlight=False)
    evidence = ", ".join(sorted({f"{r.evidence} ({r.device})" for r in results}))
    console.print(f"{report.verdict_line(results)}. Evidence: {evidence}", markup=False, highlight=False)
    console.print(f"Written: {out / 'results.jsonl'}, {out / 'junit.xml'}", markup=False, highlight=False)


@app.command("list")
def list_cases(level: Level = "full", op: Ops = None, as_json: Json = False) -> None:
    """List the case ids of a level (levels are cumulative)."""
    from glm5_hal.conformance.cases import cases

    found = list(cases(level, op or ("*",)))
    if as_json:
        rows = [
            {
                "case": c.id,
                "op": c.op,
                "dtype": c.dtype,
                "level": c.sample.level,
                "tags": sorted(c.sample.tags),
                "kind": "error" if c.bad else c.sample.fill,
            }
            for c in found
        ]
        typer.echo(json.dumps({"cases": rows}, indent=2))
        return
    for c in found:
        typer.echo(c.id)


app.command()(selftest)
