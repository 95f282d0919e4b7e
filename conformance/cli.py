"""``glm5-hal conformance``: run the suite, list its cases, judge the suite itself; and what is done with a bundle."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glm5_hal.conformance.bundle import commands
from glm5_hal.conformance.mutants.cli import selftest

if TYPE_CHECKING:
    from glm5_hal.conformance.results import Result
    from glm5_hal.conformance.waivers import Book

app = typer.Typer(no_args_is_help=True, help="Judge a backend's kernels against the float64 oracle.")

Level = Annotated[str, typer.Option(help="smoke (small shapes), standard (GLM-5's real widths) or full.")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="Only ops that match this glob. May be repeated.")]
Plugin = Annotated[
    str | None, typer.Option(help="Judge a backend that is not installed: a .py file, a package's folder, or a module.")
]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds that a case may take. [default: smoke 60, standard 300, full 1800]", min=0.1),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
def run(
    backend: Annotated[
        str | None, typer.Option(help="B or B:provider. B alone judges every provider of the backend. [default: cpu]")
    ] = None,
    plugin: Plugin = None,
    level: Level = "smoke",
    op: Ops = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case, whatever its level. May be repeated.")] = None,
    replay: Annotated[
        list[Path] | None, typer.Option(help="Only this call of your own, a safetensors file. May be repeated.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="Device to run on, as torch names it (cuda:1). Repeat it to use several.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs; a customer may choose a fresh one.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")] = Path("conformance-out"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in OUT.")] = False,
    workers: Annotated[
        int, typer.Option(help="Worker processes that share the cases. [default: one per device]", min=0)
    ] = 0,
    timeout: Timeout = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB that a worker may use beside what it starts with; 0 is no limit. CPU only.", min=0),
    ] = None,
    in_process: Annotated[bool, typer.Option("--in-process", help="No workers: for a debugger.")] = False,
    as_json: Json = False,
) -> None:
    """Run the cases and write a bundle to OUT: results.jsonl, what derives from it, and what a verifier needs.

    Each case runs in a worker process, so that a crash, a hang or exhausted memory ends that case alone. A run that was
    interrupted goes on with --resume.

    Exit codes: 0 all passed (UNSUPPORTED is not a failure, but something must pass), 1 a case failed, 2 usage, 3 the
    device is not available, 130 interrupted.
    """
    from glm5_hal.conformance import session
    from glm5_hal.conformance.results import succeeded

    wanted = session.Session(
        backend=backend or ("" if plugin else "cpu"),
        plugin=plugin or "",
        level=level,
        ops=tuple(op or ("*",)),
        cases=tuple(case or ()),
        replays=tuple(replay or ()),
        devices=tuple(device or (None,)),
        seed=seed,
        out=out,
        resume=resume,
        workers=workers,
        timeout=timeout,
        memory=memory,
        in_process=in_process,
    )
    try:
        with session.terminable():
            done = session.run(wanted)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command with --resume goes on (what is judged is kept in {out})", err=True)
        raise typer.Exit(130) from None
    _print(done.results, out, as_json, done.book)
    raise typer.Exit(0 if succeeded(done.results) else 1)


def _print(results: list[Result], out: Path, as_json: bool, book: Book | None = None) -> None:
    from rich.console import Console

    from glm5_hal.conformance import report
    from glm5_hal.conformance.results import summary
    from glm5_hal.conformance.waivers import counted

    tallies = book.tally(results) if book else ()
    if as_json:
        told = {**summary(results), "waivers": [asdict(t) for t in tallies], "out": str(out)}
        typer.echo(json.dumps(told, indent=2))
        return
    console = Console()
    console.print(report.table(results))
    for r in (r for r in results if not r.ok):
        console.print(f"[red]{r.verdict}[/]  {r.kernel or r.backend}  ", end="")
        # Unbroken: the command is copied.
        console.print(f"{r.case}  {r.detail}\n      {r.repro}", markup=False, highlight=False, soft_wrap=True)
        if r.log:
            console.print(textwrap.indent(r.log, "      | "), markup=False, highlight=False)
    for r in (r for r in results if r.remark):
        said = f"{r.verdict}  {r.kernel or r.backend}  {r.case}  alone; {r.remark}"
        said += f"; {r.culprit} does that" if r.culprit else ""
        console.print(said, markup=False, highlight=False)
    evidence = ", ".join(sorted({f"{r.evidence} ({r.device})" for r in results}))
    line = report.verdict_line(results, counted(tallies))
    console.print(f"{line}. Evidence: {evidence}", markup=False, highlight=False)
    page = out / "report.html"
    bundle = f", a bundle; open {page}" if page.is_file() else ""
    console.print(f"Written: {out}{bundle}", markup=False, highlight=False)


@app.command()
def fuzz(
    backend: Annotated[
        str | None, typer.Option(help="B or B:provider. B alone fuzzes every provider. [default: cpu:torch]")
    ] = None,
    plugin: Plugin = None,
    op: Ops = None,
    examples: Annotated[int, typer.Option(help="New cases per op; 0 tries the corpus alone.", min=0)] = 100,
    corpus: Annotated[Path, typer.Option(help="Folder of the cases that have failed.")] = Path("conformance-corpus"),
    device: Annotated[str | None, typer.Option(help="Device to run on, as torch names it (cuda:1).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of shapes and inputs.", min=0)] = 0,
    timeout: Timeout = None,
    out: Annotated[Path, typer.Option(help="Folder for fuzz.jsonl.")] = Path("conformance-out"),
    as_json: Json = False,
) -> None:
    """Judge random shapes, lengths and options of every op, in a process of its own. What fails is made small, kept in
    the corpus and tried first the next time. Needs Hypothesis: pip install 'glm5-hal[fuzz]'.

    Exit codes as of run.
    """
    from glm5_hal.conformance import fuzz as fuzzing
    from glm5_hal.conformance import report
    from glm5_hal.conformance.cases import ops_named
    from glm5_hal.conformance.journal import writable
    from glm5_hal.conformance.plan import Plan
    from glm5_hal.conformance.pool import Pool
    from glm5_hal.conformance.results import succeeded

    wanted, results = ops_named(op or ("*",)), []
    named = backend or ("" if plugin else "cpu:torch")
    plan = Plan(named, plugin or "", (device,), seed=seed, timeout=timeout, threads=1)
    with writable(out), Pool(plan) as pool:
        out.mkdir(parents=True, exist_ok=True)
        policies = [target.policy for target in pool.targets()]
        with (
            (out / "fuzz.jsonl").open("w", encoding="utf-8") as lines,
            report.shown(len(policies) * len(wanted)) as note,
        ):
            for policy in policies:
                for name in wanted:
                    for result in fuzzing.run(partial(pool.judged, policy), name, examples, seed, corpus):
                        lines.write(result.as_json() + "\n")
                        lines.flush()
                        results.append(result)
                    note(f"{name} on {policy}", sum(not r.ok for r in results))
    _print(results, out / "fuzz.jsonl", as_json)
    raise typer.Exit(0 if succeeded(results) else 1)


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


commands.register(app)
app.command()(selftest)
