"""``glm5-hal``: what is installed, why a call goes where it goes, and the conformance suite.

Exit codes: 0 ok, 1 failures, 2 usage, 3 device unavailable, 4 invalid bundle. Nothing heavy is
imported until a command needs it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glm5_hal.conformance import cli as conformance
from glm5_hal.errors import HalError, suggest
from glm5_hal.shadow import FILE

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="GLM-5 operators on every accelerator: what is there, what runs, and whether it is right.",
)
app.add_typer(conformance.app, name="conformance")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

#: Codes whose cause is the machine, not the call.
UNAVAILABLE = ("UNAVAILABLE", "PLUGIN")
#: Codes of calls that were right and did not come through.
FAILURES = ("NO_KERNEL", "KERNEL")


def main() -> None:
    """Run the command line; a HalError becomes its text on stderr and the right exit code."""
    with _own_stdout() as owned:
        code = _code()
    if owned and isinstance(code, int) and _hosts_strangers():
        sys.stderr.flush()
        os._exit(code)  # what an outside plugin leaves behind, a thread or an exit handler, may never end
    sys.exit(code)


def _code() -> int | str | None:
    try:
        app()
    except SystemExit as left:
        return left.code or 0
    except HalError as problem:
        return _failed(problem)
    except Exception as problem:
        from glm5_hal.autoload import blamed

        if (cause := blamed(problem)) is None:
            raise
        return _failed(cause)
    return 0


def _failed(problem: HalError) -> int:
    typer.echo(f"error {_printable(str(problem))}", err=True)
    return 3 if problem.code in UNAVAILABLE else 1 if problem.code in FAILURES else 2


def _printable(text: str) -> str:
    from glm5_hal.plugins.record import printable

    return printable(text)


@contextmanager
def _own_stdout() -> Iterator[bool]:
    """Keep stdout for what we print: a plugin, or a process that it starts, which writes to descriptor 1 writes to
    stderr. Not where this process's stdout is something else already, as in a test: then False."""
    before = sys.stdout
    if hasattr(before, "reconfigure"):  # a name may hold what the terminal's encoding lacks
        before.reconfigure(errors="backslashreplace")
    try:
        if before.fileno() != 1:
            raise OSError
        before.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (AttributeError, OSError, ValueError):
        yield False
        return
    sys.stdout = open(kept, "w", encoding=before.encoding, errors="backslashreplace")  # noqa: SIM115
    try:
        yield True
    finally:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        os.dup2(kept, 1)
        sys.stdout = before


def _hosts_strangers() -> bool:
    """Whether an outside plugin was loaded in this process, or a thread is left that would be waited for."""
    context = sys.modules.get("glm5_hal.context")
    loaded = context is not None and any(
        not record.builtin and record.root in sys.modules for record in context.catalogue().found
    )
    left = (t for t in threading.enumerate() if t is not threading.current_thread() and not t.daemon)
    return loaded or any(left)


def _print(as_json: bool, data: object, shown: Callable[[], Sequence[RenderableType]]) -> None:
    """What a command found: as one JSON object, or as tables, made only then, and plain text below them."""
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    for part in shown():
        typer.echo(_printable(part)) if isinstance(part, str) else console.print(part)


@app.command("list")
def list_everything(as_json: Json = False) -> None:
    """List ops, backends, providers and cache formats."""
    from glm5_hal.inventory import inventory, tables

    found = inventory()
    _print(as_json, found, lambda: tables(found))


@app.command()
def doctor(
    as_json: Json = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a backend's probe may take.", min=0.1)] = 20.0,
) -> None:
    """Check every backend: found, versions, probe, a tiny kernel; and say what to do where something is wrong.

    Exit code 1 if a backend is broken or the environment's settings are not usable.
    """
    from glm5_hal.doctor import examine, render

    found = examine(timeout)
    _print(as_json, found.as_dict(), lambda: [render(found)])
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def explain(
    op: Annotated[str, typer.Argument(help="An op of `glm5-hal list`.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Axes and scalars of the call: top_k=4096 T=64 dtype=bfloat16 device=cuda arch=sm_90"),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="A policy, as in GLM5_BACKEND.")] = None,
    require: Annotated[list[str] | None, typer.Option(help="An attribute that the kernel must claim.")] = None,
    as_json: Json = False,
) -> None:
    """Say which kernel would serve a call, and why each candidate is or is not taken.

    What is not given comes from the op's first sample. With arch=, the kernels answer as on such a device, which need
    not be there. Exit code 1 if no kernel takes the call.
    """
    from glm5_hal.context import catalogue, use
    from glm5_hal.explanation import explain as ask

    catalogue().vet()
    changes = dict(_setting(text) for text in settings or [])
    with use(backend, require=require):
        found = ask(op, **changes)
    _print(as_json, found.as_dict(), lambda: [str(found)])
    raise typer.Exit(0 if found.ok else 1)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise HalError("CONFIG", f"{text!r} is not NAME=VALUE", value=text, fix="write top_k=4096 or dtype=bfloat16")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


@app.command()
def params(
    model: Annotated[str, typer.Argument(help="glm-5, glm-5.2, deepseek-v3.2, or the path of a config.json.")],
    context: Annotated[int, typer.Option(help="Cached tokens at which FLOPs per token are counted.", min=1)] = 4096,
    as_json: Json = False,
) -> None:
    """Count a model's parameters, FLOPs per token and KV-cache bytes per token, by component."""
    from glm5_hal import params as counting

    found = counting.report(counting.load(model), context)
    _print(as_json, found, lambda: [counting.render(found)])


@app.command()
def bench(
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Only ops that match this glob. May be repeated.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="B or B:provider; B alone times every provider but the reference; cpu if not given. With --model: a "
            "policy, as in GLM5_BACKEND, which holds if not given."
        ),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(help="Whose shapes: smoke, standard (GLM-5's real widths) or full.", show_default="standard"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Storage dtype.", show_default="bfloat16")] = None,
    seconds: Annotated[float | None, typer.Option(help="Time budget per case.", min=0.01, show_default="0.5")] = None,
    model: Annotated[
        str | None, typer.Option(help="Time whole layers instead: glm-5, glm-5.2, deepseek-v3.2 or a config.json.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="With --model: cached tokens.", min=0, show_default="4096")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="With --model: rows.", min=1, show_default="1")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="With --model: new tokens of each row.", min=1, show_default="1")
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="With --model: routed experts that are built.", min=1, show_default="8")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="With --model: device, as torch names it.", show_default="cpu")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time kernels on the suite's shapes, against this machine's measured copy bandwidth and matmul rate.

    With --model, a dense and a sparse layer of a model at its real widths: which kernel serves each op, how often and
    how long. That needs transformers.
    """
    of_ops = {"op": op, "level": level, "seconds": seconds}
    of_models = {"context": context, "batch": batch, "tokens": tokens, "experts": experts, "device": device}
    for name, value in (of_ops if model is not None else of_models).items():
        if value is not None:
            what, fix = ("belongs to ops", "leave one out") if model is not None else ("needs --model", "name a model")
            raise HalError("CONFIG", f"--{name} {what}", value=value, fix=fix)
    if model is not None:
        given = {"backend": backend, "dtype": dtype, **of_models}
        _bench_model(model, as_json, **{k: v for k, v in given.items() if v is not None})
        return
    from glm5_hal.conformance.bench import measure, render

    progress = not as_json and sys.stderr.isatty()
    found = measure(
        backend or "cpu", op or ["*"], level or "standard", dtype or "bfloat16", seconds or 0.5, progress=progress
    )
    _print(as_json, found.as_dict(), lambda: [render(found)])


def _bench_model(model: str, as_json: bool, **settings: Any) -> None:
    """With the settings that were given; what was not is as `measure` has it."""
    from glm5_hal.spec import FLOATS

    if (dtype := settings.get("dtype", FLOATS[0])) not in FLOATS:
        raise HalError("CONFIG", f"no model computes in {dtype!r}", value=dtype, fix=suggest(dtype, FLOATS))
    try:
        from glm5_hal.integrations.transformers.bench import measure, render
    except ImportError as problem:
        fix = "pip install 'glm5-hal[transformers]'"
        raise HalError("CONFIG", f"--model needs transformers: {problem}", value=model, fix=fix) from None
    found = measure(model, **settings)
    _print(as_json, found.as_dict(), lambda: [render(found)])


@app.command()
def tune(
    backend: Annotated[str, typer.Option(help="A backend whose kernels' block sizes are data.")],
    op: Annotated[
        list[str] | None, typer.Option("--op", help="Only ops that match this glob. May be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time budget of one call with one choice of sizes.", min=0.01)] = 0.2,
    out: Annotated[Path | None, typer.Option(help="The tuning file to write; the backend's own if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Measure other block sizes of a backend's kernels on this device, at GLM-5's widths, and keep the faster ones.

    They go into the tuning file, as [arch.ARCH.OP], with the device, the driver and the date; the rest of it stays. An
    op takes minutes: see --op.
    """
    from glm5_hal.tuning import render
    from glm5_hal.tuning import tune as search

    progress = not as_json and sys.stderr.isatty()
    found = search(backend, op or ["*"], seconds=seconds, out=out, progress=progress)
    _print(as_json, found.as_dict(), lambda: [render(found)])


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="What GLM5_SHADOW wrote.")] = Path(FILE),
    as_json: Json = False,
) -> None:
    """Rank the ops of a live run by excess error, from the calls that GLM5_SHADOW sampled.

    "worst" and "median" are a call's largest error as a share of what it may be. Exit code 1 if a sampled call was
    wrong.
    """
    from glm5_hal.shadow import report as shadow

    rows = shadow.ranked(shadow.read(file))
    _print(as_json, {"file": str(file), "ops": rows}, lambda: [shadow.table(rows), *shadow.notes(rows)])
    raise typer.Exit(int(any(row["failed"] for row in rows)))


@app.command("new-backend")
def new_backend(
    name: Annotated[str, typer.Argument(help="The backend's name: lower-case letters, digits, '-' and '_'.")],
    out: Annotated[Path, typer.Option(help="Where the package's folder is made.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Write a working vendor package: its own pyproject, entry point, one kernel of its own, a test."""
    from glm5_hal.scaffold import write

    made = write(name, out)
    data = {"folder": str(made.folder), "files": [str(f) for f in made.files]}
    _print(as_json, data, lambda: [made.next_steps])
