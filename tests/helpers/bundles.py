"""A small bundle of everything: passes, failures, a waived one, bad inputs, UNSUPPORTED; and an attacker's tools.

As a module it is the plugin, too, whose backend the bundle judges.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch

from glm5_hal import Backend, Kernel, hookimpl
from glm5_hal.backend import Device
from glm5_hal.conformance import runner
from glm5_hal.conformance.bundle import files, fingerprint
from glm5_hal.conformance.bundle import manifest as manifests
from glm5_hal.conformance.bundle.fingerprint import Suite
from glm5_hal.conformance.bundle.manifest import Limits, Selection
from glm5_hal.conformance.cases import find
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import kernel
from glm5_hal.conformance.mutants.stand_in import NAME, Made, installed
from glm5_hal.conformance.target import targets
from glm5_hal.conformance.waivers import Book, parse

PASSES, FAILS, WAIVED = "rms_norm[float32-tokens]", "rms_norm[bfloat16-uneven]", "rms_norm[bfloat16-tokens]"
UNSUPPORTED, BAD = "hadamard[float32-rows]", "rms_norm[error-x-dtype]"
CASES = (PASSES, "rms_norm[float16-uneven]", FAILS, WAIVED, UNSUPPORTED, BAD, "topk_indices[float32-rows]")

TODAY = datetime.now(timezone.utc).date()
TARGET = f"{NAME}:native"

WAIVER: dict[str, Any] = {
    "id": "norm-scale",
    "cases": [WAIVED],
    "kernels": ["standin:*"],
    "kind": "FAIL",
    "reason": "the vector unit is off by one per cent",
    "issue": "https://tracker.example/123",
    "owner": "numerics@acme.example",
    "device": "stand-in",
    "versions": {"driver": "<2.1"},
    "since": TODAY - timedelta(10),
    "expires": TODAY + timedelta(30),
}


def toml(*entries: dict[str, Any]) -> str:
    """The text of a waivers.toml."""

    def written(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{k} = {written(v)}" for k, v in value.items()) + " }"
        return json.dumps(value) if isinstance(value, (str, list, int)) else str(value)

    return "".join(
        "[[waiver]]\n" + "".join(f"{k} = {written(v)}\n" for k, v in entry.items()) + "\n" for entry in entries
    )


def probe() -> Device:
    return Device("cpu", "stand-in", "stand-in", evidence="simulated", versions={"driver": "2.0"})


def _off_by_a_hundredth(a: Any) -> Any:
    y = honest.rms_norm()(a)
    return y * 1.01 if y.dtype == torch.bfloat16 else y


KERNELS = (
    Made("rms_norm", kernel("rms_norm", _off_by_a_hundredth), frozenset({"deterministic"})),
    Made("topk_indices", kernel("topk_indices", honest.topk()), frozenset({"deterministic"})),
)


@contextmanager
def backend() -> Iterator[None]:
    """The backend that the bundle judges, installed."""
    with installed(*KERNELS, probe=probe):
        yield


@hookimpl
def glm5_backend() -> Backend:
    return Backend(
        NAME, "cpu", probe, lambda: [Kernel(k.op, k.provider, k.fn, k.requires, k.provides) for k in KERNELS]
    )


def committed() -> Suite:
    """This suite, as if it were committed: a test may run before a commit."""
    return replace(fingerprint.suite(), clean=True)


def write(folder: Path, cases: tuple[str, ...] = CASES, waivers: str | None = None, seed: int = 0) -> Path:
    """Run the cases on the stand-in and write the bundle. The caller patches `manifests.suite`."""
    text = toml(WAIVER) if waivers is None else waivers
    with backend():
        judged = targets(NAME)
        facts = judged[0].facts
        book = Book(parse(text), TODAY, facts.name, facts.versions, text)
        results = [book.judged(r) for r in runner.run(find(cases), judged, seed)]
        folder.mkdir(parents=True, exist_ok=True)
        put(folder, [json.loads(r.as_json()) for r in results])
        selection = Selection("smoke", ("*",), cases, tuple(t.policy for t in judged), seed)
        files.write(folder, results, selection, cases, judged, book, (manifests.now(), manifests.now()))
    return folder


def rates() -> Limits:
    """What a device of no importance can do."""
    return Limits(1e10, {"float32": 1e11, "bfloat16": 4e11, "float16": 4e11})


# --- altering --------------------------------------------------------------------------------------------------------

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a results.jsonl, or of a part of one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def records(folder: Path) -> list[Record]:
    return read(folder / files.RESULTS)


def put(folder: Path, found: list[Record]) -> None:
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in found)
    (folder / files.RESULTS).write_text(text, encoding="utf-8")


def result(case: str, change: Callable[[Record], Any]) -> Callable[[Path], None]:
    """Alter one result."""

    def alter(folder: Path) -> None:
        found = records(folder)
        (mine,) = (r for r in found if r["case"] == case)
        change(mine)
        put(folder, found)

    return alter


def manifest(change: Callable[[Record], Any]) -> Callable[[Path], None]:
    """Alter the manifest."""

    def alter(folder: Path) -> None:
        said = json.loads((folder / files.MANIFEST).read_text(encoding="utf-8"))
        change(said)
        (folder / files.MANIFEST).write_text(json.dumps(said, indent=2), encoding="utf-8")

    return alter


def reseal(folder: Path) -> None:
    """Make all that derives consistent again, as an attacker with this code would."""
    bundle = files.read(folder)
    said = replace(
        bundle.manifest,
        cases=len(bundle.results),
        counts=dict(sorted(Counter(r.verdict for r in bundle.results).items())),
        waivers=bundle.book.tally(bundle.results),
        results=files.sha256(folder / files.RESULTS),
    )
    (folder / files.MANIFEST).write_text(json.dumps(said.as_dict(), indent=2), encoding="utf-8")
    for name, content in files.derived(files.read(folder)).items():
        (folder / name).write_text(content, encoding="utf-8")
    files.seal(folder)
