"""Capability as data: what a kernel asks of a call.

A requirement names what it reads, and answers a call with :class:`Accepted` or :class:`Rejected` (code, detail, fix).
The same objects drive dispatch, ``explain``, the support matrix and the conformance verdict UNSUPPORTED. Dtypes, sizes,
devices and scalars are always part of the dispatcher's table key; strides join it where a requirement reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glm5_hal.decision import ACCEPTED, Accepted, Decision, Rejected, Requirement
from glm5_hal.errors import HalError
from glm5_hal.packages import is_range, package_problem
from glm5_hal.signature import Facts, Signature

__all__ = [
    "ACCEPTED",
    "Accepted",
    "Decision",
    "Rejected",
    "Requirement",
    "absent",
    "arch",
    "at_least",
    "contiguous",
    "dtype",
    "feature",
    "limit",
    "multiple_of",
    "one_of",
    "package",
    "package_problem",
    "when",
]


@dataclass(frozen=True)
class _Dtype:
    arg: str
    allowed: tuple[str, ...]

    @property
    def reads(self) -> frozenset[tuple[str, str]]:
        return frozenset({(self.arg, "dtype")})

    def test(self, call: Signature, facts: Facts) -> Decision:
        meta = call.tensors.get(self.arg)
        if meta is None or meta.dtype in self.allowed:
            return ACCEPTED
        wanted = " or ".join(self.allowed)
        return Rejected(
            "DTYPE",
            f"{self.arg} is {meta.dtype}, this kernel takes {wanted}",
            f"convert {self.arg} to {self.allowed[0]}",
            ((f"{self.arg}.dtype", self.allowed[0]),),
        )

    def describe(self) -> str:
        return f"{self.arg} in {', '.join(self.allowed)}"


@dataclass(frozen=True)
class _Number:
    """A bound on an axis or an integer scalar: kind is "<=", ">=" or "multiple of"."""

    name: str
    kind: str
    bound: int

    @property
    def reads(self) -> frozenset[tuple[str, str]]:
        return frozenset({(self.name, "value")})

    def test(self, call: Signature, facts: Facts) -> Decision:
        got = call.value(self.name)
        if got is None:
            return ACCEPTED
        ok = {
            "<=": lambda: got <= self.bound,
            ">=": lambda: got >= self.bound,
            "multiple of": lambda: got % self.bound == 0 and got > 0,
        }[self.kind]()
        if ok:
            return ACCEPTED
        new = max(1, round(got / self.bound)) * self.bound if self.kind == "multiple of" else self.bound
        code = {"<=": "LIMIT", ">=": "MINIMUM", "multiple of": "MULTIPLE"}[self.kind]
        return Rejected(
            code,
            f"{self.name} must be {self.kind} {self.bound}, got {got}",
            f"use {self.name}={new}, or another kernel",
            ((self.name, new),),
        )

    def describe(self) -> str:
        return f"{self.name} {self.kind} {self.bound}"


@dataclass(frozen=True)
class _OneOf:
    name: str
    allowed: tuple[Any, ...]

    @property
    def reads(self) -> frozenset[tuple[str, str]]:
        return frozenset({(self.name, "value")})

    def test(self, call: Signature, facts: Facts) -> Decision:
        got = call.value(self.name)
        if got in self.allowed or (got is None and self.name not in call.scalars):
            return ACCEPTED
        wanted = ", ".join(map(repr, self.allowed))
        return Rejected(
            "CHOICE",
            f"{self.name} must be one of {wanted}, got {got!r}",
            f"use {self.name}={self.allowed[0]!r}, or another kernel",
            ((self.name, self.allowed[0]),),
        )

    def describe(self) -> str:
        return f"{self.name} in {', '.join(map(str, self.allowed))}"


@dataclass(frozen=True)
class _Contiguous:
    arg: str

    @property
    def reads(self) -> frozenset[tuple[str, str]]:
        return frozenset({(self.arg, "strides"), (self.arg, "shape")})

    def test(self, call: Signature, facts: Facts) -> Decision:
        meta = call.tensors.get(self.arg)
        if meta is None or meta.contiguous:
            return ACCEPTED
        return Rejected(
            "STRIDE",
            f"{self.arg} must be contiguous, its strides are {meta.strides} for shape {meta.shape}",
            f"pass {self.arg}.contiguous()",
            ((f"{self.arg}.strides", None),),
        )

    def describe(self) -> str:
        return f"{self.arg} contiguous"


@dataclass(frozen=True)
class _Absent:
    arg: str

    @property
    def reads(self) -> frozenset[tuple[str, str]]:
        return frozenset({(self.arg, "dtype")})

    def test(self, call: Signature, facts: Facts) -> Decision:
        if call.tensors.get(self.arg) is None:
            return ACCEPTED
        return Rejected(
            "UNSUPPORTED_ARG", f"this kernel does not take {self.arg}", f"leave {self.arg} out", ((self.arg, None),)
        )

    def describe(self) -> str:
        return f"without {self.arg}"


@dataclass(frozen=True)
class _Arch:
    allowed: tuple[str, ...]
    reads: frozenset[tuple[str, str]] = frozenset()

    def test(self, call: Signature, facts: Facts) -> Decision:
        if facts.arch in self.allowed:
            return ACCEPTED
        wanted = " or ".join(self.allowed)
        return Rejected("ARCH", f"this kernel is for {wanted}, the device is {facts.arch}", f"run it on {wanted}")

    def describe(self) -> str:
        return f"arch {', '.join(self.allowed)}"


@dataclass(frozen=True)
class _Feature:
    name: str
    fix: str
    reads: frozenset[tuple[str, str]] = frozenset()

    def test(self, call: Signature, facts: Facts) -> Decision:
        if self.name in facts.features:
            return ACCEPTED
        return Rejected("FEATURE", f"the device or its software lacks {self.name}", self.fix)

    def describe(self) -> str:
        return f"feature {self.name}"


@dataclass(frozen=True)
class _Package:
    """An installed distribution within a version range, as the probe reported it or as its metadata says."""

    name: str
    versions: str
    reads: frozenset[tuple[str, str]] = frozenset()

    def test(self, call: Signature, facts: Facts) -> Decision:
        problem = package_problem(self.name, self.versions, facts.versions)
        if problem is None:
            return ACCEPTED
        return Rejected("PACKAGE", problem, f"pip install '{self.name}{self.versions}'")

    def describe(self) -> str:
        return f"{self.name}{self.versions}"


@dataclass(frozen=True)
class _When:
    predicate: Callable[[Signature], bool]
    reason: str
    fix: str
    reads: frozenset[tuple[str, str]]

    def test(self, call: Signature, facts: Facts) -> Decision:
        return ACCEPTED if self.predicate(call) else Rejected("CONDITION", self.reason, self.fix)

    def describe(self) -> str:
        return self.reason


def dtype(arg: str, *allowed: str) -> Requirement:
    """``arg`` has one of these dtypes (torch names: "bfloat16")."""
    _demand(allowed, f"dtype({arg!r}) allows nothing", "name at least one dtype")
    return _Dtype(arg, allowed)


def limit(name: str, maximum: int) -> Requirement:
    """An axis or integer scalar is at most ``maximum``."""
    return _Number(name, "<=", maximum)


def at_least(name: str, minimum: int) -> Requirement:
    """An axis or integer scalar is at least ``minimum``."""
    return _Number(name, ">=", minimum)


def multiple_of(name: str, factor: int) -> Requirement:
    """An axis or integer scalar is a positive multiple of ``factor``."""
    _demand(factor > 0, f"multiple_of({name!r}, {factor})", "the factor is positive")
    return _Number(name, "multiple of", factor)


def one_of(name: str, *allowed: Any) -> Requirement:
    """An axis or scalar is one of these values."""
    _demand(allowed, f"one_of({name!r}) allows nothing", "name at least one value")
    return _OneOf(name, allowed)


def contiguous(arg: str) -> Requirement:
    """``arg`` is row-major without gaps."""
    return _Contiguous(arg)


def absent(arg: str) -> Requirement:
    """The optional tensor ``arg`` is not given."""
    return _Absent(arg)


def arch(*allowed: str) -> Requirement:
    """The probed device's architecture is one of these ("sm_90")."""
    _demand(allowed, "arch() allows nothing", "name at least one architecture")
    return _Arch(allowed)


def feature(name: str, fix: str) -> Requirement:
    """The probe reported this feature."""
    _demand(fix.strip(), f"feature({name!r}) says no fix", "say what brings the feature")
    return _Feature(name, fix)


def package(name: str, versions: str) -> Requirement:
    """The distribution ``name`` is installed in a version within ``versions`` (PEP 440, ">=2.9")."""
    what = f"package({name!r}, {versions!r}): these are no versions"
    _demand(is_range(versions), what, "write them as PEP 440 has them: '>=2.9'")
    return _Package(name, versions)


def when(
    predicate: Callable[[Signature], bool], reason: str, fix: str, *, reads: tuple[tuple[str, str], ...]
) -> Requirement:
    """Only where data cannot say it. ``reads`` lists everything that ``predicate`` looks at."""
    _demand(reason.strip() and fix.strip(), "when() without a reason or a fix", "say what is asked, and what to do")
    return _When(predicate, reason, fix, frozenset(reads))


def _demand(good: object, what: str, fix: str) -> None:
    if not good:
        raise HalError("CONTRACT", what, fix=fix)
