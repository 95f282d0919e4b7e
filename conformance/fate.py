"""What becomes of a case whose worker is gone: tried again in a fresh one, or blamed. Decisions only; the pool acts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.plan import Incident, Task
from glm5_hal.conformance.process import Ending, place
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.target import Target, fields_of


def verdict(ending: Ending, seconds: float) -> tuple[str, str, str]:
    """Verdict, code and detail of what was being judged when its worker ended."""
    if ending.late:
        return "HANG", "TIMEOUT", f"did not end within {seconds:g} s{place(ending.log)}"
    return ending.verdict


def blamed(case: Case, target: Target, seed: int, ending: Ending, seconds: float) -> Result:
    """The result of a case that ended a worker in which nothing else had run."""
    kind, code, detail = verdict(ending, seconds)
    took = seconds if ending.late else 0.0
    said = {"verdict": kind, "code": code, "detail": detail, "log": ending.log, "seconds": took}
    return Result(**fields_of(case, target, seed) | said)


def unprepared(task: Task, targets: Mapping[str, Target], seed: int, ending: Ending) -> Iterator[Result]:
    """The results of a case whose worker ended before any kernel had run in it."""
    said = f"preparing the case took too long{place(ending.log)}" if ending.late else ending.verdict[2]
    for policy in task.policies:
        fields = fields_of(task.case, targets[policy], seed)
        what = f"the suite itself failed: {said}"
        yield Result(**fields, verdict="ERROR", code="CONTRACT", detail=what, log=ending.log)


def again(task: Task, policy: str, begun: Sequence[tuple[Case, str]], before: str) -> Task:
    """The task for another try in a fresh worker. ``begun``: what had run in this one, with ``policy`` as the last
    where one was running."""
    return replace(task, before=before, company=tuple(begun[:-1] if policy else begun))


def left(task: Task, policy: str) -> Task | None:
    """What is still to be judged of a task, its unlucky kernel first."""
    if not task.policies:
        return None
    rest = tuple(p for p in task.policies if p != policy)
    return replace(task, policies=(policy, *rest) if policy else rest)


def settled(task: Task, result: Result) -> tuple[Task, Result, Incident | None]:
    """A result that stands: what is left of its task, the result with what it gave before, and whether that was
    something else."""
    rest = tuple(p for p in task.policies if p != result.backend)
    after = replace(task, policies=rest, before="", company=())
    if task.before.split(" ")[0] in ("", result.verdict):
        return after, result, None
    incident = Incident(task.case, result.backend, task.before, task.company)
    return after, replace(result, remark=incident.remark), incident


def idle(begun: Sequence[tuple[Case, str]], ending: Ending, seconds: float) -> Incident:
    """A worker that ended when it was judging nothing: what had run in it may have left a thread that ended it."""
    kind, _, detail = verdict(ending, seconds)
    case, policy = begun[-1]
    return Incident(case, policy, f"{kind} ({detail})", tuple(begun[:-1]), idle=True)
