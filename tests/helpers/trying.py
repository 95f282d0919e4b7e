"""One wrong kernel, all checks: which of them say so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from glm5_hal.conformance.mutants.honest import Args, kernel
from glm5_hal.conformance.mutants.stand_in import judge
from glm5_hal.conformance.results import Result

NARROW = ("bfloat16", "float16", "float32")


def caught_by(op: str, body: Callable[[Args], Any], **how: Any) -> set[str]:
    """Every check that fails a kernel, on any case; "raised" if it raised."""
    return {name for r in _results(op, body, **how) for name in failing(r)}


def failing(result: Result) -> set[str]:
    found = {name for name, said in result.checks.items() if said.startswith("failed")}
    return found or ({result.code or result.verdict} if not result.ok else set())


def said(op: str, body: Callable[[Args], Any], check: str, **how: Any) -> str:
    """What a check says first."""
    results = _results(op, body, **how)
    return next(r.checks[check] for r in results if check in failing(r))


def _results(op: str, body: Callable[[Args], Any], dtypes: Sequence[str] = NARROW, **how: Any) -> list[Result]:
    return judge(op, body if hasattr(body, "__signature__") else kernel(op, body), dtypes=dtypes, **how)
