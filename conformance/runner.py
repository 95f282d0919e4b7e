"""Run cases on a backend's kernels, one verdict each.

Everything happens in this process for now; ``run_case`` is the unit that a worker process will call.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from glm5_hal import context, ops
from glm5_hal.backend import Device, Unavailable
from glm5_hal.conformance import oracle
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.inputs import Draw, digest
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.trial import Expected, Finding, Trial, same_bits
from glm5_hal.errors import HalError, suggest
from glm5_hal.resolve import Choice
from glm5_hal.spec import Inputs


@dataclass(frozen=True)
class Target:
    """What is judged: one provider of one backend, on one of its devices."""

    backend: str
    provider: str
    device: str
    facts: Device

    @property
    def policy(self) -> str:
        return f"{self.backend}:{self.provider}"


@dataclass(frozen=True)
class Subject:
    """A case with its inputs and expectations, shared by every kernel that is judged on it."""

    case: Case
    inputs: Inputs
    expected: Expected | None
    digest: str
    seed: int


def targets(backend: str, device: str | None = None) -> list[Target]:
    """What ``--backend B[:provider]`` names: one provider, or all of the backend's.

    Raises:
        HalError: UNKNOWN for a name that does not exist, UNAVAILABLE where the device is not there.
    """
    name, _, provider = backend.partition(":")
    catalogue = context.catalogue()
    record = catalogue.record(name)
    if record.status != "ok":
        raise HalError("PLUGIN", f"backend {name}: {record.reason}", value=name, fix=record.fix)
    facts = catalogue.device(name)
    if isinstance(facts, Unavailable):
        raise HalError("UNAVAILABLE", f"backend {name}: {facts.reason}", value=name, fix=facts.fix)
    found = [p for p in catalogue.providers(name) or () if p != "composite"]
    if provider and provider not in found:
        raise HalError("UNKNOWN", f"backend {name} has no provider {provider!r}", value=provider, fix=suggest(provider, found))
    if device is not None and device.split(":")[0] != facts.type:
        raise HalError(
            "DEVICE", f"backend {name} computes on {facts.type}, not on {device}", value=device, fix=f"use {facts.type}:0"
        )
    return [Target(name, p, device or facts.type, facts) for p in ([provider] if provider else found)]


def run(cases: Sequence[Case], judged: Sequence[Target], seed: int) -> Iterator[Result]:
    """Every case on every target, case by case, so that oracles are computed once."""
    for case in cases:
        subject: Subject | HalError | None = None
        for target in judged:
            start = time.perf_counter()
            if subject is None:
                subject = _prepared(case, seed)
            yield run_case(subject, case, target, seed, start)


def _prepared(case: Case, seed: int) -> Subject | HalError:
    try:
        return subject_of(case, seed)
    except Exception as problem:  # noqa: BLE001 - becomes the verdict ERROR of this case; the run goes on
        where = traceback.extract_tb(problem.__traceback__)[-1]
        return HalError("CONTRACT", f"{type(problem).__name__}: {problem} ({where.name}, line {where.lineno})")


def subject_of(case: Case, seed: int) -> Subject:
    """Draw a case's inputs and compute what is expected of them."""
    inputs = case.spec.inputs(case.sample, case.dtype, Draw(seed, case.id if case.bad is None else case.op))
    expected = None
    if case.bad is None:
        expected = Expected(oracle.truth(case.spec, inputs.args), oracle.emulation(case.spec, inputs.args))
    return Subject(case, inputs, expected, digest(inputs.args), seed)


def run_case(subject: Subject | HalError, case: Case, target: Target, seed: int, start: float | None = None) -> Result:
    """Judge one case on one target. Never raises for what a kernel does."""
    began = time.perf_counter() if start is None else start
    fields: dict[str, Any] = {
        "case": case.id,
        "op": case.op,
        "backend": target.policy,
        "kernel": "",
        "evidence": target.facts.evidence,
        "device": target.facts.name,
        "dtype": case.dtype,
        "level": case.sample.level,
        "seed": seed,
        "repro": f"glm5-hal conformance run --backend {target.policy} --case '{case.id}' --seed {seed}",
    }
    try:
        if isinstance(subject, HalError):
            fields |= {"verdict": "ERROR", "code": "CONTRACT", "detail": f"the suite itself failed: {subject.what}"}
        else:
            fields |= _judge(subject, target)
    except HalError as refusal:
        fields |= _refused(refusal)
    except torch.OutOfMemoryError as problem:
        fields |= {"verdict": "OOM", "detail": str(problem)}
    except MemoryError as problem:
        fields |= {"verdict": "OOM", "detail": str(problem) or "out of memory"}
    except Exception as problem:  # noqa: BLE001 - whatever a kernel raises is its verdict, never the end of the run
        fields |= {"verdict": "FAIL", "code": "RAISED", "detail": _last_line(problem)}
    return Result(**fields, seconds=time.perf_counter() - began)


def _judge(subject: Subject, target: Target) -> dict[str, Any]:
    case = subject.case
    op = getattr(ops, case.op)
    with context.use(target.policy), torch.inference_mode():
        placed = {
            k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in subject.inputs.args.items()
        }
        try:
            choice: Choice = op.choose(**placed)
        except HalError as refusal:
            return _refused(refusal) | {"inputs": subject.digest}
        found = {"kernel": choice.name, "inputs": subject.digest}
        if case.bad is not None:
            return found | _judge_bad(subject, op, placed)
        assert subject.expected is not None
        kernel = replace(choice.kernel, provides=claims(case, choice, placed))
        trial = Trial(case, subject.inputs, kernel, op, target.device, subject.expected, target.facts.facts)
        return found | _checked(trial)


class _Recorder:
    """The namespace of ops for a composite's body, noting what the kernels of its parts claim."""

    def __init__(self) -> None:
        self.parts: list[tuple[Sequence[str], frozenset[str]]] = []

    def __getattr__(self, name: str) -> Any:
        op = getattr(ops, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.parts.append((op.spec.attributes, op.choose(*args, **kwargs).kernel.provides))
            return op(*args, **kwargs)

        return called


def claims(case: Case, choice: Choice, placed: dict[str, Any]) -> frozenset[str]:
    """What the chosen kernel claims. A composite can give any attribute that is asked of its parts; unasked, it holds
    what all of its parts claim."""
    if choice.kernel.provider != "composite":
        return choice.kernel.provides
    recorder = _Recorder()
    case.spec.reference(recorder, **oracle.copied(case.spec, placed))
    return frozenset(
        a for a in case.spec.attributes if all(a in has or a not in knows for knows, has in recorder.parts)
    )


def _refused(refusal: HalError) -> dict[str, Any]:
    """No kernel takes the call, or one of the parts of a composite: UNSUPPORTED. Any other refusal is a failure."""
    if refusal.code != "NO_KERNEL":
        return {"verdict": "FAIL", "code": refusal.code, "detail": refusal.what}
    reason = refusal.trace[-1].decision if refusal.trace else None
    code, detail = (reason.code, reason.detail) if reason else ("NOT_IMPLEMENTED", refusal.what)
    return {"verdict": "UNSUPPORTED", "code": code, "detail": detail}


def _checked(trial: Trial) -> dict[str, Any]:
    said: dict[str, str] = {}
    accuracy, failed = Finding(True), ""
    start = time.perf_counter()
    trial.first  # noqa: B018 - timed on its own; every check reads it
    kernel_seconds = time.perf_counter() - start
    for name, check in CHECKS.items():
        try:
            finding = check(trial)
        except Exception as problem:  # noqa: BLE001 - a kernel that raises under one check has failed that check
            finding = Finding(False, f"raised {_last_line(problem)}")
        said[name] = "ok" if finding.ok else f"n/a: {finding.detail}" if finding.ok is None else f"failed: {finding.detail}"
        accuracy = finding if name == "accuracy" else accuracy
        failed = failed or (f"{name}: {finding.detail}" if finding.ok is False else "")
    verdict = "FAIL" if failed else "MISTRUSTED" if accuracy.mistrusted else "PASS"
    return {
        "verdict": verdict,
        "code": failed.split(":")[0] if failed else "",
        "detail": failed or ("the inputs prove nothing: the oracle's output is constant" if accuracy.mistrusted else ""),
        "errors": accuracy.errors,
        "budget": accuracy.budget,
        "checks": said,
        "kernel_seconds": kernel_seconds,
    }


def _judge_bad(subject: Subject, op: Any, placed: dict[str, Any]) -> dict[str, Any]:
    """A bad input raises its declared HalError, and nothing has been written when it does."""
    bad = subject.case.bad
    assert bad is not None
    spoilt = bad.spoil(dict(placed))
    watched = {k: v for k, v in {**placed, **_prefixed(spoilt)}.items() if _readable(v)}
    before = {k: v.clone() for k, v in watched.items()}
    try:
        op(**spoilt)
        problem = f"accepted; it should raise HalError({bad.code})"
    except HalError as refusal:
        right = refusal.code == bad.code and refusal.fix
        problem = "" if right else f"raised {refusal.code} (fix: {refusal.fix!r}), it should raise {bad.code} with a fix"
    except Exception as other:  # noqa: BLE001 - any other exception type is what this case is there to catch
        problem = f"raised {type(other).__name__}: {other}; it should raise HalError({bad.code})"
    touched = [k for k, v in watched.items() if not same_bits(before[k].cpu(), v.cpu())]
    if touched and not problem:
        problem = f"wrote {', '.join(touched)} before refusing"
    return {
        "verdict": "FAIL" if problem else "PASS",
        "code": "errors" if problem else "",
        "detail": problem,
        "checks": {"errors": f"failed: {problem}" if problem else "ok"},
    }


def _prefixed(spoilt: dict[str, Any]) -> dict[str, Any]:
    return {f"spoilt {k}": v for k, v in spoilt.items()}


def _readable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "meta"


def _last_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"
