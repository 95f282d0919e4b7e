"""``glm5-hal conformance verify``, ``diff`` and ``report``."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from glm5_hal.conformance.bundle.files import Bundle

Folder = Annotated[Path, typer.Argument(help="The --out of a run.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

UNSIGNED = "The bundle is not signed: this proves that it is consistent, not that it is honest."


def register(app: typer.Typer) -> None:
    """Add the commands to ``glm5-hal conformance``."""
    for command in (verify, diff, report):
        app.command()(command)


def verify(
    folder: Folder,
    rerun: Annotated[int, typer.Option(help="Compute so many cases again and compare.", min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Which cases --rerun takes; drawn if not given.", min=0)] = None,
    device: Annotated[str | None, typer.Option(help="Device for --rerun, as torch names it.")] = None,
    plugin: Annotated[
        str | None, typer.Option(help="Backend for --rerun that is not installed, as run has it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle offline: files, suite, cases, counts, and that every verdict follows from its numbers.

    A bundle is not signed, so this proves consistency only. --rerun computes cases again, from the recorded seed and in
    worker processes: it needs the backend and its device. Exit codes: 0 consistent, 2 usage, 3 no device for --rerun,
    4 invalid.
    """
    from glm5_hal.conformance.bundle import rerun as again
    from glm5_hal.conformance.bundle.verify import verify as check
    from glm5_hal.errors import HalError

    if not folder.is_dir():
        raise HalError("CONFIG", f"{folder} is no folder", value=str(folder), fix="name the --out of a run")
    problems, bundle = check(folder)
    choice = secrets.randbelow(2**31) if seed is None else seed
    done = None
    if rerun and bundle is not None:
        done = again.rerun(bundle, rerun, choice, device, plugin or "")
        problems += done.problems
    if as_json:
        told = {
            "ok": not problems,
            "cases": 0 if bundle is None else len(bundle.results),
            "problems": [asdict(p) for p in problems],
            "rerun": None if done is None else {**asdict(done), "seed": choice},
            "note": UNSIGNED,
        }
        typer.echo(json.dumps(told, indent=2))
    else:
        for problem in problems:
            typer.echo(str(problem))
        if done is not None:
            how = f"verdicts and inputs, not errors ({done.unlike})" if done.unlike else "verdicts, inputs and errors"
            typer.echo(f"Computed {len(done.cases)} cases again (--seed {choice}), compared {how}.")
        if bundle is not None:
            typer.echo(_of_what(bundle))
        state = f"invalid, {len(problems)} problems" if problems else "consistent"
        typer.echo(f"{folder}: {state}. {UNSIGNED}")
    raise typer.Exit(4 if problems else 0)


def _of_what(bundle: Bundle) -> str:
    from glm5_hal.conformance.waivers import counted

    said, count = bundle.manifest, bundle.manifest.counts
    part = "" if said.selection.whole else ", in part"
    counts = ", ".join(f"{n} {verdict}" for verdict, n in count.items()) or "none"
    return (
        f"{', '.join(said.selection.targets)} on {said.device.name}, level {said.selection.level}{part}, seed "
        f"{said.selection.seed}: {said.cases} cases: {counts}; {counted(said.waivers) or 'no waivers'}. "
        f"Evidence: {said.device.evidence}"
    )


def diff(a: Folder, b: Folder, as_json: Json = False) -> None:
    """Compare two bundles case by case: verdicts first, then errors, then speed. Two vendors, or two drivers.

    Exit code 1 if verdicts differ. What is compared is what the bundles say; `verify` them first.
    """
    from glm5_hal.conformance.bundle.diff import diff as compare
    from glm5_hal.conformance.bundle.diff import render
    from glm5_hal.conformance.bundle.files import opened

    found = compare(opened(a), opened(b))
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console(markup=False, highlight=False).print(render(found))
    raise typer.Exit(1 if found.verdicts else 0)


def report(folder: Folder, as_json: Json = False) -> None:
    """Write report.html, report.md and junit.xml of a bundle anew, from its results and manifest.

    Their lines of SHA256SUMS are renewed too, and no others.
    """
    from glm5_hal.conformance.bundle import files

    bundle = files.opened(folder)
    derived = files.derived(bundle)
    for name, content in derived.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
    files.resum(folder, derived)
    if as_json:
        typer.echo(json.dumps({"written": [str(folder / name) for name in derived]}, indent=2))
    else:
        typer.echo(f"Written: {', '.join(str(folder / name) for name in derived)}")
