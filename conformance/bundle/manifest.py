"""What a bundle says of its run: who judged, what was judged, where, when, and what came out."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from glm5_hal.backend import EVIDENCE, Device
from glm5_hal.conformance import typed
from glm5_hal.conformance.bundle.fingerprint import Suite, combined, listed, spec_hashes, suite
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.waivers import Book, Tally

if TYPE_CHECKING:
    from glm5_hal.conformance.target import Target

SCHEMA = 1

#: Settings that put an interpreter in a compiler's place: what ran under them is no evidence about hardware.
INTERPRETERS = ("TRITON_INTERPRET",)


@dataclass(frozen=True)
class Selection:
    """What was asked for: all cases of ``level`` of the ops that match ``ops``, or ``cases`` alone; on ``targets``
    ("backend:provider"), with the inputs of ``seed``."""

    level: str
    ops: tuple[str, ...]
    cases: tuple[str, ...]
    targets: tuple[str, ...]
    seed: int

    @property
    def whole(self) -> bool:
        """Every case of the level."""
        return not self.cases and "*" in self.ops


@dataclass(frozen=True)
class Host:
    """Where it ran: operating system, architecture, Python, torch and numpy, threads of torch, and which of
    :data:`INTERPRETERS` were on."""

    os: str
    machine: str
    python: str
    versions: Mapping[str, str]
    threads: int
    interpreters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """What the device did in the same run: copied bytes per second (read plus write), and floating-point operations per
    second of a matrix product, by dtype. ``problem`` says why there are none."""

    bytes_per_second: float = 0.0
    flops_per_second: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Facts:
    """The device as the backend's probe found it."""

    type: str
    name: str
    arch: str
    count: int
    evidence: str
    versions: Mapping[str, str]
    features: tuple[str, ...]

    @classmethod
    def of(cls, device: Device) -> Facts:
        """From a probe's answer."""
        return cls(
            device.type,
            device.name,
            device.arch,
            device.count,
            device.evidence,
            dict(device.versions),
            tuple(sorted(device.features)),
        )


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``. Times are UTC, ISO 8601; ``spec`` is the hash of all of ``specs``, ``case_list`` that of the
    cases that were asked for, ``results`` that of results.jsonl."""

    suite: Suite
    spec: str
    specs: Mapping[str, str]
    selection: Selection
    case_list: str
    device: Facts
    host: Host
    limits: Limits
    started: str
    ended: str
    cases: int
    counts: Mapping[str, int]
    waivers: tuple[Tally, ...]
    results: str
    schema: int = SCHEMA

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Raises ValueError, and says why, for anything but what `as_dict` gives."""
        said = typed.read(cls, data, "the manifest")
        if said.schema != SCHEMA:
            raise ValueError(f"schema {said.schema}; this suite reads {SCHEMA}")
        if said.device.evidence not in EVIDENCE:
            raise ValueError(f"no evidence is called {said.device.evidence!r:.80}")
        if said.host.threads < 1:
            raise ValueError(f"{said.host.threads} threads compute nothing")
        for time in (said.started, said.ended):
            if datetime.fromisoformat(time).utcoffset() != timedelta(0):
                raise ValueError(f"{time!r:.80} is no time in UTC")
        return said


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def day_of(time: str) -> date:
    """The day on which waivers are held against a run that ends then."""
    return datetime.fromisoformat(time).date()


def case_list(ids: Iterable[str]) -> str:
    return listed(sorted(ids))


def describe(
    selection: Selection, cases: Sequence[str], judged: Sequence[Target], results: Sequence[Result], book: Book
) -> dict[str, Any]:
    """What follows from a run, as keywords of `Manifest`; the times and the hash of the results are the caller's."""
    hashes = spec_hashes()
    return {
        "suite": suite(),
        "spec": combined(hashes),
        "specs": dict(hashes),
        "selection": selection,
        "case_list": case_list(cases),
        "device": Facts.of(judged[0].facts),
        "host": host(),
        "limits": limits(judged[0].device, {r.dtype for r in results if r.kernel_seconds}),
        "cases": len(results),
        "counts": dict(sorted(Counter(r.verdict for r in results).items())),
        "waivers": book.tally(results),
    }


def host() -> Host:
    import numpy
    import torch

    return Host(
        os=platform.platform(),
        machine=platform.machine(),
        python=platform.python_version(),
        versions={"numpy": numpy.__version__, "torch": torch.__version__},
        threads=torch.get_num_threads(),
        interpreters=tuple(name for name in INTERPRETERS if os.environ.get(name, "0") not in ("", "0")),
    )


def limits(device: str, dtypes: Iterable[str]) -> Limits:
    """Measured now, within about a second; a device that cannot do it after the run has no limits, and says why."""
    from glm5_hal.conformance import bench

    try:
        rates = {dtype: bench.matmul_rate(device, dtype, 0.05) for dtype in sorted(dtypes)}
        return Limits(bench.copy_rate(device, 0.1), rates) if rates else Limits(problem="no kernel was timed")
    except Exception as problem:  # noqa: BLE001 - a device that a kernel has broken must not cost the run its results
        return Limits(problem=f"{type(problem).__name__}: {problem}".splitlines()[0])
