"""Who damaged a process in which another kernel then failed: found by running the two together.

A write past the end of a buffer may pass every check of its own case and bring down a later one, which alone is
innocent; a thread that a kernel left behind may bring down a worker that is judging nothing. Each of the last few
kernels that had run before is followed by the victim in a worker of their own, or is alone in one that is watched; the
first of which it comes again is to blame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.plan import Incident, Plan, Task
from glm5_hal.conformance.pool import Pool
from glm5_hal.conformance.process import SERVE
from glm5_hal.conformance.results import Result

#: How many kernels before a victim are suspected, and how many victims are looked into.
SUSPECTS, VICTIMS = 3, 8

#: Seconds for which a worker is watched whose kernels have run.
WATCHED = 5.0


def culprits(
    plan: Plan, incidents: Sequence[Incident], results: Mapping[tuple[str, str], Result], serve: str = SERVE
) -> Iterator[Result]:
    """New results: verdict CRASH and code AFTERMATH for cases that have passed and damage their process, and what is
    known of its author for every incident's own case."""
    known = dict(results)
    for number, incident in enumerate(incidents):
        ran = (*incident.company, (incident.case, incident.policy)) if incident.idle else incident.company
        author = _author(plan, incident, ran[: -SUSPECTS - 1 : -1], serve) if number < VICTIMS else None
        for result in _corrected(incident, author, len(ran), number, known):
            known[result.case, result.backend] = result
            yield result


def _author(
    plan: Plan, incident: Incident, suspects: Sequence[tuple[Case, str]], serve: str
) -> tuple[Case, str] | None:
    return next((s for s in suspects if _comes_again(plan, Task(s[0], (s[1],)), incident, serve)), None)


def _comes_again(plan: Plan, suspect: Task, incident: Incident, serve: str) -> bool:
    with Pool(replace(plan, devices=plan.devices[:1], workers=1), serve) as pool:
        pool.targets()
        list(pool.run([suspect] if incident.idle else [suspect, Task(incident.case, (incident.policy,))]))
        if incident.idle:
            pool.watch(WATCHED)
    return any(found.idle == incident.idle for found in pool.incidents)


def _corrected(
    incident: Incident, author: tuple[Case, str] | None, ran: int, number: int, known: Mapping[tuple[str, str], Result]
) -> Iterator[Result]:
    victim = known.get((incident.case.id, incident.policy))
    if author is None:
        if victim is not None:
            yield replace(victim, remark=f"{incident.remark}; {_unknown(ran, number)}")
        return
    case, policy = author
    suspect = known.get((case.id, policy))
    if suspect is not None and suspect.ok:  # what has failed by itself has its verdict
        yield replace(suspect, verdict="CRASH", code="AFTERMATH", detail=_said(incident))
    if victim is not None and not incident.idle:
        yield replace(victim, remark=incident.remark, culprit=f"{case.id} on {policy}")


def _said(incident: Incident) -> str:
    if incident.idle:
        return f"its process is damaged: it gave {incident.before} afterwards, when no kernel was running"
    said = f"its process is damaged: {incident.case.id} on {incident.policy}, judged next, gave "
    return f"{said}{incident.before}; alone it does not"


def _unknown(ran: int, number: int) -> str:
    """Why nobody is known to have done it."""
    if number >= VICTIMS:
        return f"who did that was not looked for: {VICTIMS} incidents were looked into before"
    of = f"the last {SUSPECTS} of these kernels" if ran > SUSPECTS else "these kernels"
    return f"none of {of} does that again"
