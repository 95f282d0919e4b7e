"""Run cases on a backend's kernels, one verdict each.

All in the calling process: ``run_case`` is the unit that a worker process calls, see `glm5_hal.conformance.pool`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from glm5_hal import context, ops
from glm5_hal.capability import Rejected
from glm5_hal.conformance import relations
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import CHECKS, Check
from glm5_hal.conformance.relations import Relation
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.subject import Subject, prepared
from glm5_hal.conformance.target import Target, fields_of
from glm5_hal.conformance.trial import Finding, Trial, same_bits
from glm5_hal.errors import HalError
from glm5_hal.resolve import Choice


def run(cases: Sequence[Case], judged: Sequence[Target], seed: int) -> Iterator[Result]:
    """Every case on every target, case by case, so that oracles are computed once."""
    for case in cases:
        subject: Subject | HalError | None = None
        for target in judged:
            start = time.perf_counter()
            if subject is None:
                subject = prepared(case, seed)
            yield run_case(subject, case, target, seed, start)


def run_case(
    subject: Subject | HalError,
    case: Case,
    target: Target,
    seed: int,
    start: float | None = None,
    checks: Mapping[str, Check] = CHECKS,
) -> Result:
    """Judge one case on one target. Never raises for what a kernel does."""
    began = time.perf_counter() if start is None else start
    fields = fields_of(case, target, seed)
    try:
        if isinstance(subject, HalError):
            fields |= {"verdict": "ERROR", "code": "CONTRACT", "detail": f"the suite itself failed: {subject.what}"}
        else:
            fields |= _judge(subject, target, checks)
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # noqa: BLE001 - whatever a kernel raises is its verdict, never the end of the run
        fields |= _raised(problem)
    return Result(**fields, seconds=time.perf_counter() - began)


def _raised(problem: BaseException) -> dict[str, Any]:
    if (said := _out_of_memory(problem)) is not None:
        return {"verdict": "OOM", "detail": said or "out of memory"}
    code = problem.code if isinstance(problem, HalError) else "RAISED"
    return {"verdict": "FAIL", "code": code, "detail": _last_line(problem)}


def _out_of_memory(problem: BaseException) -> str | None:
    """What an exception says that tells of exhausted memory. On the CPU torch has no class for it."""
    cause = problem.value if isinstance(problem, HalError) and problem.code == "KERNEL" else problem
    typed = isinstance(cause, (torch.OutOfMemoryError, MemoryError))
    return str(cause) if typed or (isinstance(cause, RuntimeError) and _NO_MEMORY.search(str(cause))) else None


_NO_MEMORY = re.compile(r"Allocator: (not enough|can't allocate) memory|std::bad_alloc")


def _judge(subject: Subject, target: Target, checks: Mapping[str, Check]) -> dict[str, Any]:
    case = subject.case
    if case.relation is not None:
        return _judge_relation(subject, case.relation, target)
    op = getattr(ops, case.op)
    with context.use(target.policy), torch.inference_mode():
        placed = {k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in subject.inputs.args.items()}
        found = {"kernel": "", "inputs": subject.digest}
        try:
            choice: Choice = op.choose(**placed)
            kernel = replace(choice.kernel, provides=claims(case, choice, placed))
        except HalError as refusal:
            return found | _refused(refusal, op, placed)
        found["kernel"] = choice.name
        if case.bad is not None:
            return found | _judge_bad(subject, op, placed, target.device)
        assert subject.expected is not None
        device, facts = target.device, target.facts.facts
        trial = Trial(case, subject.inputs, kernel, op, device, subject.expected, facts, subject.other)
        return found | _checked(trial, checks)


def _judge_relation(subject: Subject, relation: Relation, target: Target) -> dict[str, Any]:
    found = {"kernel": target.policy, "inputs": subject.digest}
    args = {k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in subject.inputs.args.items()}
    with context.use(target.policy), torch.inference_mode():
        try:
            finding = relations.judge(relation, ops, args)
        except HalError as refusal:
            if refusal.code != "NO_KERNEL":
                raise
            step = refusal.trace[0].decision if refusal.trace else None
            code, detail = (step.code, step.detail) if isinstance(step, Rejected) else ("NOT_IMPLEMENTED", refusal.what)
            return found | {"kernel": "", "verdict": "UNSUPPORTED", "code": code, "detail": detail}
    return found | {
        "verdict": "PASS" if finding.ok else "FAIL",
        "code": "" if finding.ok else relations.GROUP,
        "detail": finding.detail,
        "errors": finding.errors,
        "budget": finding.budget,
        "checks": {relations.GROUP: "ok" if finding.ok else f"failed: {finding.detail}"},
    }


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
    case.spec.reference(recorder, **{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in placed.items()})
    return frozenset(
        a for a in choice.kernel.provides if all(a in has or a not in knows for knows, has in recorder.parts)
    )


def _refused(refusal: HalError, op: Any, placed: dict[str, Any]) -> dict[str, Any]:
    """No kernel takes the call, or none takes a part of the composite that would: UNSUPPORTED. Any other refusal is a
    failure."""
    if refusal.code != "NO_KERNEL":
        return _raised(refusal)
    # What the backend's own kernel of this op says comes before what is said of the parts that would replace it.
    own = op.resolution(op.describe(**placed)).trace
    said = [s.decision for s in (*own, *reversed(refusal.trace)) if isinstance(s.decision, Rejected)]
    reason = next((r for r in said if r.code != "NOT_LISTED"), None)  # nobody judges what was not named
    code, detail = (reason.code, reason.detail) if reason else ("NOT_IMPLEMENTED", refusal.what)
    # A requirement that cannot answer is broken: that is no statement about what the kernel takes.
    return {"verdict": "FAIL" if code == "CONTRACT" else "UNSUPPORTED", "code": code, "detail": detail}


def _checked(trial: Trial, checks: Mapping[str, Check]) -> dict[str, Any]:
    said: dict[str, str] = {}
    accuracy, failed = Finding(True), ""
    trial.raw  # noqa: B018 - a kernel that raises here has raised, not failed a check
    for name, check in checks.items():
        try:
            finding = check(trial)
        except KeyboardInterrupt:
            raise
        except BaseException as problem:
            if _out_of_memory(problem) is not None:
                raise
            finding = Finding(False, f"raised {_last_line(problem)}")
        if finding.mistrusted and name != "accuracy":  # whose word it is
            finding = Finding(None, f"proves nothing: {finding.detail}")
        said[name] = (
            "ok" if finding.ok else f"n/a: {finding.detail}" if finding.ok is None else f"failed: {finding.detail}"
        )
        accuracy = finding if name == "accuracy" else accuracy
        failed = failed or (f"{name}: {finding.detail}" if finding.failed else "")
    verdict = "FAIL" if failed else "MISTRUSTED" if accuracy.mistrusted else "PASS"
    return {
        "verdict": verdict,
        "code": failed.split(":")[0] if failed else "",
        "detail": failed or (accuracy.detail if accuracy.mistrusted else ""),
        "errors": accuracy.errors,
        "budget": accuracy.budget,
        "checks": said,
        "kernel_seconds": trial.kernel_seconds,
        "claims": sorted(trial.kernel.provides.intersection(trial.spec.attributes)),
        "work": trial.work,
    }


def _judge_bad(subject: Subject, op: Any, placed: dict[str, Any], device: str) -> dict[str, Any]:
    """A bad input raises its declared HalError, and nothing has been written when it does.

    Off the CPU, where reading values would sync, they are checked only if asked for; unasked, a bad index is a broken
    promise, and would take the device's context with it.
    """
    bad = subject.case.bad
    assert bad is not None
    with torch.inference_mode(False):  # which a tensor that asks for a gradient cannot come from
        spoilt = bad.spoil(dict(placed))
    watched = {k: v for k, v in {**placed, **_prefixed(spoilt)}.items() if _readable(v)}
    before = {k: v.clone() for k, v in watched.items()}
    try:
        checked = context.use(check=None if device.split(":")[0] == "cpu" else "values")
        with checked, torch.inference_mode(False), torch.enable_grad():
            op(**spoilt)
        problem = f"accepted; it should raise HalError({bad.code})"
    except HalError as refusal:
        right = refusal.code == bad.code and refusal.fix
        problem = (
            "" if right else f"raised {refusal.code} (fix: {refusal.fix!r}), it should raise {bad.code} with a fix"
        )
    except KeyboardInterrupt:
        raise
    except BaseException as other:  # noqa: BLE001 - any other exception type is what this case is there to catch
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


def _last_line(problem: BaseException) -> str:
    return problem.what if isinstance(problem, HalError) else f"{type(problem).__name__}: {problem}"
