"""Who damaged a process in which another kernel then failed: found by running the two together.

A write past the end of a buffer may pass every check of its own case and bring down a later one, which alone is
innocent. Each of the last few kernels that had run before is followed by the victim in a worker of their own; the first
after which the victim fails again is to blame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from glm5_hal.conformance.plan import Incident, Plan, Task
from glm5_hal.conformance.pool import Pool
from glm5_hal.conformance.process import SERVE
from glm5_hal.conformance.results import Result

#: How many kernels before a victim are suspected, and how many victims are looked into.
SUSPECTS, VICTIMS = 3, 8


def culprits(
    plan: Plan, incidents: Sequence[Incident], results: Mapping[tuple[str, str], Result], serve: str = SERVE
) -> Iterator[Result]:
    """New results, verdict CRASH and code AFTERMATH, for cases that have passed and damage their process."""
    convicted: set[tuple[str, str]] = set()
    for incident in incidents[:VICTIMS]:
        for case, policy in reversed(incident.company[-SUSPECTS:]):
            key = (case.id, policy)
            if key in convicted or key not in results or not results[key].ok:
                break  # what is known to be wrong explains it
            if _together(plan, Task(case, (policy,)), incident, serve):
                convicted.add(key)
                said = f"its process is damaged: {incident.case.id} on {incident.policy}, judged next, gave "
                said += f"{incident.before}; alone it does not"
                yield replace(results[key], verdict="CRASH", code="AFTERMATH", detail=said)
                break


def _together(plan: Plan, suspect: Task, incident: Incident, serve: str) -> bool:
    """Whether the victim fails after the suspect, in one process, as it does not alone."""
    with Pool(replace(plan, devices=plan.devices[:1], workers=1), serve) as pool:
        pool.targets()
        list(pool.run([suspect, Task(incident.case, (incident.policy,))]))
    return bool(pool.incidents)
