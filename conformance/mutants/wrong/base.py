"""A kernel with one thing wrong, and the check that is to find it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from glm5_hal.conformance.mutants.honest import Body, kernel
from glm5_hal.ops import specs
from glm5_hal.ops._common.references import reference_of

DETERMINISTIC = ("deterministic",)
FP32 = ("float32",)
CANONICAL = ("deterministic", "sorted_indices", "canonical_ties")

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Wrong:
    """``make`` gives a new kernel, so that none keeps what it saw. ``by``: the check that fails it first.

    ``needs``: what finds it, where no run of the suite can. ``seeds``: draws on which it shows.
    """

    op: str
    name: str
    make: Callable[[], Fn]
    by: str | tuple[str, ...] = "accuracy"
    provides: Sequence[str] = DETERMINISTIC
    dtypes: Sequence[str] = ("bfloat16",)
    needs: str = ""
    seeds: Sequence[int] = (0,)

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


def bodied(op: str, name: str, body: Body, by: str | tuple[str, ...] = "accuracy", **more: Any) -> Wrong:
    return Wrong(op, name, lambda: kernel(op, body), by, **more)


def wrapped(op: str, run: Callable[[Fn, dict[str, Any]], Any]) -> Fn:
    """A kernel that does something around the reference, and says so."""
    reference, signature = reference_of(op), specs()[op].signature

    def wrong(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return run(reference, dict(bound.arguments))

    wrong.__signature__ = signature  # type: ignore[attr-defined]
    wrong.provider = "reference"  # type: ignore[attr-defined]
    return wrong
