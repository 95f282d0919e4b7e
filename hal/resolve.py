"""Which kernel serves a call: decided before the call, from declared capability, with the whole trace kept.

Pure: the same catalogue, policy and signature give the same answer, and nothing is changed by asking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.decision import ACCEPTED, Accepted, Decision, Rejected, Requirement
from glm5_hal.errors import HalError, shown
from glm5_hal.plugins.isolation import attempted, kind_of, plain, told
from glm5_hal.policy import Target
from glm5_hal.signature import Signature
from glm5_hal.spec import OpSpec


class Entry(Protocol):
    """What resolution reads of a plugin record."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def fix(self) -> str: ...
    @property
    def backend(self) -> Backend | None: ...


class Catalogue(Protocol):
    """What resolution needs to know of the installed backends."""

    def named(self, name: str) -> Sequence[Entry]: ...

    def of_device(self, device_type: str, *, outside: bool = True) -> Iterator[Entry]: ...

    def unusable(self) -> Iterator[Entry]: ...

    def device(self, name: str) -> Device | Unavailable: ...

    def kernels(self, name: str, op: str) -> Sequence[Kernel]: ...


@dataclass(frozen=True)
class Step:
    """One candidate, and what became of it."""

    candidate: str
    decision: Decision

    def __str__(self) -> str:
        return f"{self.candidate:<18} {self.decision}"

    def as_dict(self) -> Mapping[str, object]:
        if isinstance(self.decision, Accepted):
            return {"candidate": self.candidate, "accepted": True}
        return {
            "candidate": self.candidate,
            "accepted": False,
            "code": self.decision.code,
            "detail": self.decision.detail,
            "fix": self.decision.fix,
        }


@dataclass(frozen=True)
class Choice:
    """``fallback``: the policy lists a backend before this one that might have served the call's device."""

    backend: str
    kernel: Kernel
    fallback: bool

    @property
    def name(self) -> str:
        return f"{self.backend}:{self.kernel.provider}"


@dataclass(frozen=True)
class Resolution:
    """The first accepted kernel, if any, every candidate that was considered on the way, and the kernels among them."""

    chosen: Choice | None
    trace: tuple[Step, ...]
    considered: tuple[Kernel, ...] = ()


def resolve(
    spec: OpSpec,
    call: Signature,
    catalogue: Catalogue,
    targets: Sequence[Target],
    require: frozenset[str] = frozenset(),
    *,
    exhaustive: bool = False,
) -> Resolution:
    """Walk the candidates in the policy's order; the first that accepts is chosen.

    ``exhaustive`` goes on after the choice, so that `explain` shows what every candidate would say.
    """
    device_type = _device_type(call)
    trace: list[Step] = []
    considered: list[Kernel] = []
    chosen: Choice | None = None
    first: int | None = None
    for position, target, entry in _entries(targets, catalogue, device_type):
        if first is None and not _is_elsewhere(entry, device_type):
            first = position
        for step, kernel in _candidates(spec, call, catalogue, entry, target, require, device_type):
            trace.append(step)
            if kernel is not None:
                considered.append(kernel)
                if chosen is None and isinstance(step.decision, Accepted):
                    chosen = Choice(entry.name, kernel, fallback=position != first)
            if chosen is not None and not exhaustive:
                return Resolution(chosen, tuple(trace), tuple(considered))
    return Resolution(chosen, tuple(trace), tuple(considered))


def left_out(
    spec: OpSpec, call: Signature, catalogue: Catalogue, targets: Sequence[Target], *, outside: bool
) -> Iterator[Step]:
    """What could compute on the call's device and was not considered, and how to allow it; nothing is probed.

    Without ``outside`` only built-in backends count: a plugin that nobody named is not loaded for an error's sake.
    """
    device_type = _device_type(call)
    walked = {entry.name: (target, entry) for _, target, entry in _entries(targets, catalogue, device_type)}
    for target, entry in walked.values():
        if target.provider is None and _has_reference(catalogue, entry, spec.name, device_type):
            name = f"{entry.name}:reference"
            yield Step(name, Rejected("NOT_LISTED", "slow, and used only when it is named", f"GLM5_BACKEND={name}"))
    for entry in catalogue.of_device(device_type, outside=outside):
        if entry.status == "ok" and entry.name not in walked:
            fix = f"add ',{entry.name}' to GLM5_BACKEND to allow it"
            yield Step(entry.name, Rejected("NOT_LISTED", "the policy does not name it", fix))
    if outside and any(target.backend == "auto" for target in targets):
        for entry in catalogue.unusable():
            if entry.name not in walked:
                yield Step(entry.name or entry.root, Rejected("PLUGIN", entry.reason, entry.fix))


def _has_reference(catalogue: Catalogue, entry: Entry, op: str, device_type: str) -> bool:
    if entry.status != "ok" or entry.backend is None or entry.backend.device_type != device_type:
        return False
    try:
        return any(kernel.provider == "reference" for kernel in catalogue.kernels(entry.name, op))
    except HalError:  # said in the trace
        return False


def _device_type(call: Signature) -> str:
    return next((meta.device.split(":")[0] for meta in call.tensors.values() if meta is not None), "cpu")


def _entries(targets: Sequence[Target], catalogue: Catalogue, device_type: str) -> Iterator[tuple[int, Target, Entry]]:
    """Backends in the order of the policy. ``auto`` takes every backend of the tensors' device, built-in ones first."""
    for position, target in enumerate(targets):
        named = target.backend != "auto"
        for entry in catalogue.named(target.backend) if named else catalogue.of_device(device_type):
            yield position, target, entry


def _is_elsewhere(entry: Entry, device_type: str) -> bool:
    """Whether it computes on another kind of device; of a broken plugin that is not known."""
    return entry.backend is not None and entry.backend.device_type != device_type


def _candidates(
    spec: OpSpec,
    call: Signature,
    catalogue: Catalogue,
    entry: Entry,
    target: Target,
    require: frozenset[str],
    device_type: str,
) -> Iterator[tuple[Step, Kernel | None]]:
    if entry.backend is None or entry.status != "ok":
        yield Step(entry.name, Rejected("PLUGIN", entry.reason, entry.fix)), None
        return
    if _is_elsewhere(entry, device_type):
        wanted = entry.backend.device_type
        yield (
            Step(
                entry.name,
                Rejected(
                    "DEVICE",
                    f"the tensors are on {device_type}, backend {entry.name} computes on {wanted}",
                    f"move the tensors to {wanted}, or name a backend for {device_type} (nothing is copied for you)",
                ),
            ),
            None,
        )
        return
    device = catalogue.device(entry.name)
    if isinstance(device, Unavailable):
        yield Step(entry.name, Rejected("UNAVAILABLE", device.reason, device.fix)), None
        return
    try:
        offered = catalogue.kernels(entry.name, spec.name)
    except HalError as problem:
        yield Step(entry.name, Rejected("PLUGIN", problem.what, problem.fix)), None
        return
    kernels = [
        k
        for k in offered
        if (k.provider == target.provider or k.provider == "composite")
        or (target.provider is None and k.provider != "reference")
    ]
    if not kernels:
        which = f"{entry.name}:{target.provider}" if target.provider else entry.name
        yield (
            Step(
                which, Rejected("NOT_IMPLEMENTED", f"has no kernel for {spec.name}", "list a fallback in GLM5_BACKEND")
            ),
            None,
        )
    for kernel in sorted(kernels, key=lambda k: (k.provider != target.provider, k.rank)):
        yield Step(f"{entry.name}:{kernel.provider}", _judge(spec, call, kernel, device, require, entry.root)), kernel


def _judge(
    spec: OpSpec, call: Signature, kernel: Kernel, device: Device, require: frozenset[str], root: str
) -> Decision:
    missing = sorted((require & set(spec.attributes)) - kernel.provides)
    if missing:
        return Rejected(
            "ATTRIBUTE",
            f"does not claim {', '.join(missing)}",
            "drop it from hal.use(require=...), or use another kernel",
        )
    for requirement in kernel.requires:
        decision = _asked(requirement, call, device, root)
        if isinstance(decision, Rejected):
            return decision
    return ACCEPTED


def described(requirement: Requirement) -> str:
    """A requirement in its own words, if it has any."""
    words, _ = attempted(lambda: plain(str(requirement.describe())))
    return kind_of(requirement) if words is None else words


def _asked(requirement: Requirement, call: Signature, device: Device, root: str) -> Decision:
    """A requirement's answer; one that fails to answer is a no, for this kernel alone. ``root`` is its plugin's."""
    answer, problem = attempted(lambda: _answer(requirement.test(call, device.facts)))
    if isinstance(answer, Decision):
        return answer
    said = answer if problem is None else f"raised {told(problem, root)[0]}"
    return Rejected(
        "CONTRACT", f"its requirement {described(requirement)!r} {said}", "report it to the backend's maintainer"
    )


def _answer(found: object) -> Decision | str:
    """A vendor's decision as one of ours, of plain texts: they are shown, and go into JSON. Else what it is instead."""
    if isinstance(found, Accepted):
        return ACCEPTED
    if not isinstance(found, Rejected):
        return f"answered {shown(found)}, not Accepted or Rejected"
    words = (found.code, found.detail, found.fix)
    wrong = [kind_of(word) for word in words if not isinstance(word, str)]
    if wrong:
        return f"answered Rejected with {wrong[0]} where code, detail and fix are text"
    code, detail, fix = map(plain, words)
    return Rejected(code, detail, fix, tuple(found.patch))
