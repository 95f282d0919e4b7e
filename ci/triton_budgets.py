"""What compiled Triton kernels are held to: ``ci/triton_budgets.toml``, read and applied."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("triton_budgets.toml")


@dataclass(frozen=True)
class Target:
    """A chip: how Triton calls it, the bytes of shared memory that one program may have, its vendor's tuning file, and
    the module of kernels that are for this chip alone."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int = 0
    tuning: str = ""
    own: str = ""


@dataclass(frozen=True)
class Excuse:
    """Kernels that these globs match may fail, or may keep ``at_most`` registers of a thread in memory."""

    op: str
    kernel: str
    dtype: str
    target: str
    reason: str
    at_most: int = 0

    def covers(self, kernel: Mapping[str, Any]) -> bool:
        return all(fnmatchcase(kernel[name], getattr(self, name)) for name in ("op", "kernel", "dtype", "target"))

    def __str__(self) -> str:
        return f"{self.target}: {self.op} {self.kernel} {self.dtype}"


@dataclass(frozen=True)
class Budgets:
    targets: Mapping[str, Target]
    spills: Sequence[Excuse]
    failures: Sequence[Excuse]


def read(file: Path) -> Budgets:
    """Raises ValueError for what is no budget: a key too many or too few, an excuse without a reason."""
    text = tomllib.loads(file.read_text(encoding="utf-8"))
    try:
        targets = {name: Target(name, **given) for name, given in text.pop("targets").items()}
        spills, failures = ([Excuse(**given) for given in text.pop(name, [])] for name in ("spills", "failures"))
    except (KeyError, TypeError) as problem:
        raise ValueError(f"{file}: {problem}") from problem
    if text:
        raise ValueError(f"{file}: nothing is called {min(text)!r}")
    for excuse in (*spills, *failures):
        if not excuse.reason.strip():
            raise ValueError(f"{file}: {excuse} has no reason")
    return Budgets(targets, spills, failures)


def broken(budgets: Budgets, kernels: Sequence[Mapping[str, Any]], *, whole: bool) -> Iterator[str]:
    """Each broken gate, in words. ``whole``: everything was compiled, so that an excuse that nothing needs shows."""
    failed = [kernel for kernel in kernels if kernel["problem"]]
    for (whose, problem), forms in _together(failed, ("op", "provider", "kernel"), "problem"):
        bare = [form for form in forms if not any(excuse.covers(form) for excuse in budgets.failures)]
        if bare:
            targets = ", ".join(dict.fromkeys(form["target"] for form in bare))
            yield f"{whose}: {problem} ({len(bare)} forms, of {targets}; the first is {bare[0]['call']})"
    for (whose, target), forms in _together(kernels, ("target", "op", "provider", "kernel", "dtype"), "target"):
        most, shared = budgets.targets[target].shared, max(form["shared"] for form in forms)
        if shared > most:
            yield f"{whose}: {shared} bytes of shared memory, there are {most}"
        spilled = max(form["spilled"] for form in forms)
        allowed = max((excuse.at_most for excuse in budgets.spills if excuse.covers(forms[0])), default=0)
        if spilled > allowed:
            yield f"{whose}: {spilled} registers of a thread are spilled, {allowed} may be"
    if whole:
        spilling = [kernel for kernel in kernels if kernel["spilled"]]
        for what, listed, found in (("fails", budgets.failures, failed), ("spills", budgets.spills, spilling)):
            idle = (excuse for excuse in listed if not any(excuse.covers(kernel) for kernel in found))
            yield from (f"{excuse}: no longer {what}: remove its excuse" for excuse in idle)


def _together(
    kernels: Sequence[Mapping[str, Any]], names: Sequence[str], more: str
) -> Iterator[tuple[tuple[str, str], list[Mapping[str, Any]]]]:
    """Forms of one kernel, under what they have in common."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for kernel in kernels:
        groups.setdefault((" ".join(kernel[name] for name in names), kernel[more]), []).append(kernel)
    yield from groups.items()
