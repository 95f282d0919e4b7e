"""What is asked of a call, and the typed answer: yes, or no with a code, a detail and a fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from glm5_hal.signature import Facts, Signature


@dataclass(frozen=True)
class Accepted:
    def __str__(self) -> str:
        return "accepted"


@dataclass(frozen=True)
class Rejected:
    """A typed no. ``patch`` is the fix in a form that a program can apply to the call: ((name, new value), ...);
    names are axes, scalars, ``tensor.dtype``, ``tensor.strides`` (None: contiguous), or an optional tensor (None: leave
    it out). It is empty where the fix is outside the call."""

    code: str
    detail: str
    fix: str
    patch: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"rejected  {self.code}  {self.detail}  -> {self.fix}"


Decision = Accepted | Rejected
ACCEPTED = Accepted()


@runtime_checkable
class Requirement(Protocol):
    """``reads`` names what the answer depends on: ("q", "dtype"), ("q", "shape"), ("q", "strides"), ("k", "value")."""

    @property
    def reads(self) -> frozenset[tuple[str, str]]: ...

    def test(self, call: Signature, facts: Facts) -> Decision: ...

    def describe(self) -> str: ...
