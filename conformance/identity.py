"""What must be the same for two halves of a run to be one run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from glm5_hal import context
from glm5_hal.conformance.bundle.fingerprint import files_of, hashed, suite
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.target import Target

#: Distributions on which a verdict may depend.
VERSIONS = ("glm5-hal", "torch", "numpy", "triton", "onnxruntime")


def of_backend(target: Target) -> dict[str, Any]:
    """The backend, its device and its code, by content. Asked where the backend is loaded."""
    record = context.catalogue().record(target.backend)
    facts = target.facts
    found = {"name": target.backend, "from": record.origin, "device": f"{facts.name} ({facts.arch})"}
    return found | {"versions": dict(facts.versions), "code": hashed(files_of(record.root))}


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
        "suite": suite().code,
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


def _installed() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name) or "without a version"
        except metadata.PackageNotFoundError:
            continue
        except (OSError, ValueError) as problem:
            found[name] = f"cannot be read: {problem}"
    return found


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and " " not in text else text
