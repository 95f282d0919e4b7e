"""The worker's end of `pool`: judges one kernel a job."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from glm5_hal.backends import _torch
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.mutants import mechanical, stand_in, wrong
from glm5_hal.conformance.mutants.honest import catalogue, kernel
from glm5_hal.conformance.mutants.stand_in import Made
from glm5_hal.conformance.results import Result

Beat = Callable[[], None]

#: Failed cases after which nothing more is learnt of a mutant that several checks have failed.
ENOUGH = 4


def main() -> None:
    """Answer jobs from stdin until it ends."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what kernels print is not part of the conversation

    def beat() -> None:
        lines.write("{}\n")

    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    beat()
    for line in sys.stdin:
        job = json.loads(line)
        torch.manual_seed(0)
        answer = JOBS[job.pop("do")](beat, **job)
        lines.write(json.dumps({"answer": answer}) + "\n")


def _end_with(parent: int) -> None:
    """A mutant that loops must not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def trace(beat: Beat, op: str) -> dict[str, Any]:
    """Lines that the op's kernel executes, by case."""

    def arguments(case: Case) -> Mapping[str, Any]:
        beat()
        subject = stand_in.subject_of(case, 0)
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in subject.inputs.args.items()}

    return mechanical.executed(op, stand_in.good_cases(op), arguments)


def by_hand(beat: Beat, id: str, everything: bool) -> dict[str, Any]:
    """A wrong kernel or a cheat, on the dtypes in which it shows."""
    mutant = next(w for w in wrong.ALL if w.id == id)
    made = stand_in.made_of(mutant.op, mutant.make(), mutant.provides)
    chosen = [c for c in stand_in.good_cases(mutant.op) if stand_in.wanted(c, mutant.dtypes)]
    results = (r for seed in mutant.seeds for r in _results(beat, [made], chosen, seed))
    return _verdict(results, everything)


def by_machine(beat: Beat, id: str, cases: Mapping[str, Sequence[str]], everything: bool) -> dict[str, Any]:
    """A mutant of our own source, on the cases (by op) that execute it."""
    # All of them, so that a composite without a kernel is made of its parts, dispatched.
    made = [Made(k.op, k.fn, k.provides) for k in _torch.kernels()]
    by_op = [[c for c in stand_in.good_cases(op) if c.id in set(ids)] for op, ids in cases.items()]
    chosen = [queue[i] for i in range(max(map(len, by_op))) for queue in by_op if i < len(queue)]
    for case in chosen:  # what is expected, before the mutant is in place
        beat()
        stand_in.subject_of(case, 0)
    with mechanical.in_place(mechanical.find(id)):
        return _verdict(_results(beat, made, chosen), everything)


def honest(beat: Beat, op: str, names: Sequence[str], seed: int, checks: Sequence[str] | None) -> dict[str, Any]:
    """Honest kernels of an op on one draw of every case, in the dtypes that they take."""
    chosen = [c for c in stand_in.good_cases(op) if stand_in.wanted(c, catalogue.DTYPES)]
    alarms, judged = [], 0
    for name in names:
        body, provides = catalogue.HONEST[op][name]
        made = Made(op, kernel(op, body), frozenset(provides))
        for result in _results(beat, [made], chosen, seed, checks):
            judged += 1
            if not result.ok:
                alarms.append(f"{name}: {result.case} seed {seed}: {result.verdict} {result.detail}")
    if seed:  # the first draw is that of the mutants
        stand_in.forget(seed)
    return {"cases": judged, "alarms": alarms}


def _results(
    beat: Beat, made: Sequence[Made], chosen: Sequence[Case], seed: int = 0, checks: Sequence[str] | None = None
) -> Iterator[Result]:
    with ExitStack() as stack:
        stack.enter_context(stand_in.installed(*made))
        for case in chosen:
            beat()
            yield stand_in.judged(case, seed, checks)


def _verdict(results: Iterator[Result], everything: bool) -> dict[str, Any]:
    judged, failed, checks = 0, list[Result](), set[str]()
    for result in results:
        judged += 1
        if not result.ok:
            failed.append(result)
            checks |= set(_failing(result))
            if not everything or (len(failed) >= ENOUGH and len(checks) > 1):
                break
    first = failed[0] if failed else None
    return {
        "checks": sorted(checks),
        "by": _failing(first)[0] if first else "",
        "case": first.case if first else "",
        "detail": first.detail[:300] if first else "",
        "cases": judged,
    }


def _failing(result: Result) -> list[str]:
    """The checks that failed a kernel; "raises" where it did not come that far, the verdict where it is no FAIL."""
    if result.verdict not in ("FAIL", "OOM"):
        return [result.verdict.lower()]
    return [name for name in CHECKS if result.checks.get(name, "").startswith("failed")] or ["raises"]


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "trace": trace,
    "by_hand": by_hand,
    "by_machine": by_machine,
    "honest": honest,
}
