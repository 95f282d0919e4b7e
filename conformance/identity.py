"""What must be the same for two halves of a run to be one run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from glm5_hal import context
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.runner import Target

#: Distributions on which a verdict may depend.
VERSIONS = ("glm5-hal", "torch", "numpy", "triton", "onnxruntime")


def of_backend(target: Target) -> dict[str, Any]:
    """The backend, its device and its code, by content. Asked where the backend is loaded."""
    record = context.catalogue().record(target.backend)
    facts = target.facts
    found = {"name": target.backend, "from": record.origin, "device": f"{facts.name} ({facts.arch})"}
    return found | {"versions": dict(facts.versions), "code": digest(_package(record.root))}


def of_run(
    backend: Mapping[str, Any], policies: Sequence[str], level: str, seed: int, cases: Sequence[Case]
) -> dict[str, Any]:
    """Everything, as JSON can hold it."""
    ids = [case.id for case in cases]
    return {
        "policies": list(policies),
        "level": level,
        "seed": seed,
        "cases": {"count": len(ids), "sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest()},
        "backend": dict(backend),
        "suite": {name: digest(_package(f"glm5_hal.{name}")) for name in ("conformance", "ops", "backends")},
        "core": digest(path for path in _package("glm5_hal") if path.suffix == ".py"),
        "versions": {"python": platform.python_version(), **_installed()},
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two identities differ, in words."""
    found: list[str] = []
    for key in dict.fromkeys((*a, *b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            found.append(f"{prefix}{key} was {_short(x)} and is {_short(y)}")
    return found


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents."""
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path.name} {path.stat().st_size}\n".encode())
        whole.update(path.read_bytes())
    return whole.hexdigest()


def _package(name: str) -> list[Path]:
    """The files of a module, or of a package and what lies in its folder."""
    spec = util.find_spec(name)
    if spec is None:
        return []
    if not spec.submodule_search_locations:
        return [Path(spec.origin)] if spec.origin else []
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    return [p for f in folders for p in f.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def _installed() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text
