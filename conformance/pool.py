"""Cases in worker processes: whatever a kernel does to its process ends its case, and the run goes on.

A worker is started once and reused. A case that dies, hangs, runs out of memory or loses the device in a used worker is
tried again in a fresh one, and blamed only if it fails there too: what an earlier kernel damaged is not its fault.
"""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from glm5_hal.conformance import drawing
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.fate import again, blamed, idle, left, settled, unprepared, verdict
from glm5_hal.conformance.greeting import Greeting, heard
from glm5_hal.conformance.plan import START, STARTS, Incident, Plan, Task
from glm5_hal.conformance.process import SERVE, Ending, Process, place
from glm5_hal.conformance.results import Result, from_record
from glm5_hal.conformance.target import Target
from glm5_hal.errors import HalError


@dataclass
class _Slot:
    """A place for a worker, and what its worker is doing."""

    job: dict[str, Any]
    process: Process | None = None
    targets: Mapping[str, Target] = field(default_factory=dict)
    own: deque[Task] = field(default_factory=deque)
    task: Task | None = None
    policy: str = ""
    begun: list[tuple[Case, str]] = field(default_factory=list)
    deadline: float = 0.0
    fds: tuple[int, ...] = ()


class Pool:
    """Workers, for the length of a `with` block. What they are judging when it is left is not judged."""

    def __init__(self, plan: Plan, serve: str = SERVE) -> None:
        self.plan, self._serve = plan, serve
        self.greeting: Greeting | None = None
        self.incidents: list[Incident] = []
        self._slots = [_Slot(plan.job(place)) for place in range(plan.count)]
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0
        self._targets: Mapping[str, Target] = {}

    def __enter__(self) -> Pool:
        for slot in self._slots:
            self._start(slot)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            if slot.process is not None:
                slot.process.end()
        self._selector.close()

    def greeted(self) -> Greeting:
        """What the first worker says of itself. Raises HalError as `targets` does."""
        while self.greeting is None:
            for _ in self._turn():
                pass
        return self.greeting

    def targets(self) -> list[Target]:
        """What the backend's name stands for. Raises what `greeted` does."""
        return list(self.greeted().targets)

    def run(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """Every task's results, as they come."""
        waiting = deque(tasks)
        while waiting or any(slot.task or slot.own for slot in self._slots):
            for slot in self._slots:
                self._assign(slot, waiting)
            yield from self._turn()
        for slot in self._slots:  # one that has ended since is not to be forgotten
            while slot.process is not None and slot.begun:
                yield from self._see_to(slot, slot.process)
                if slot.process is None or not slot.process.closing:
                    break

    def watch(self, seconds: float) -> None:
        """Wait for a worker's end, which is an incident, though nothing runs in it any more."""
        until, known = time.monotonic() + seconds, len(self.incidents)
        while len(self.incidents) == known and (rest := until - time.monotonic()) > 0:
            self._selector.select(rest)
            for slot in self._slots:
                if slot.process is not None:
                    for _ in self._see_to(slot, slot.process):
                        pass

    def judged(self, policy: str, case: Case) -> Result:
        """One case on one kernel."""
        (result,) = self.run([Task(case, (policy,))])
        return result

    # --- one worker's life -------------------------------------------------------------------------------------------

    def _start(self, slot: _Slot) -> None:
        slot.process = Process(slot.job, self._serve)
        slot.targets, slot.begun, slot.policy = {}, [], ""
        slot.deadline = time.monotonic() + START
        slot.fds = slot.process.fds
        for fd in slot.fds:
            self._selector.register(fd, selectors.EVENT_READ, slot)

    def _forget(self, slot: _Slot) -> None:
        for fd in slot.fds:
            self._selector.unregister(fd)
        slot.process, slot.targets = None, {}

    def _assign(self, slot: _Slot, waiting: deque[Task]) -> None:
        if slot.task is not None or not (slot.own or waiting):
            return
        if slot.process is None:
            self._start(slot)
        if slot.process is None or not slot.targets:
            return
        slot.task, slot.policy = (slot.own or waiting).popleft(), ""
        seconds = self.plan.seconds(slot.task.case)
        slot.deadline = time.monotonic() + self.plan.preparing(slot.task.case)
        order = {
            "case": slot.task.case.id,
            "file": slot.task.case.file,
            "point": drawing.as_record(slot.task.case) if slot.task.case.point else None,
            "policies": slot.task.policies,
            "seed": self.plan.seed,
        }
        slot.process.send({**order, "dump_after": max(0.8 * seconds, seconds - 2)})

    def _turn(self) -> Iterator[Result]:
        """Wait until a worker says something, ends, or is late; then see to it."""
        running = [slot for slot in self._slots if slot.process is not None and (slot.task or not slot.targets)]
        nearest = min((slot.deadline for slot in running), default=0.0)
        self._selector.select(max(0.0, nearest - time.monotonic()))
        for slot in self._slots:
            if slot.process is not None:
                yield from self._see_to(slot, slot.process)

    def _see_to(self, slot: _Slot, process: Process) -> Iterator[Result]:
        messages, ending = process.look()
        for message in messages:
            try:
                yield from self._heard(slot, process, message)
            except (ValueError, TypeError, KeyError, AttributeError) as problem:
                what = f"the worker sent what is no answer ({type(problem).__name__}: {problem})"
                ending = ending or process.end(what)
                break
            if slot.process is not process:  # its last word was enough
                return
        if ending is None and (slot.task or not slot.targets) and time.monotonic() > slot.deadline:
            ending = replace(process.end(), late=True)
        if ending is not None:
            self._forget(slot)
            yield from self._lost(slot, ending)

    def _heard(self, slot: _Slot, process: Process, message: Mapping[str, Any]) -> Iterator[Result]:
        task = slot.task
        if "refused" in message:
            no = message["refused"]
            raise HalError(no["code"], no["what"], value=no["value"], fix=no["fix"])
        if "hello" in message and not slot.targets:
            slot.targets = self._greeted(message)
        elif task is None:
            raise ValueError(f"{sorted(message)} unasked")
        elif "begin" in message:
            slot.policy = task.policies[task.policies.index(message["begin"])]
            slot.begun.append((task.case, slot.policy))
            slot.deadline = time.monotonic() + self.plan.seconds(task.case)
        elif "result" in message:
            result, sound = from_record(message["result"]), message["sound"] is True
            if (result.case, result.backend) != (task.case.id, slot.policy):
                raise ValueError(f"a result of {result.case!r} on {result.backend!r}")
            if result.verdict == "UNSUPPORTED":  # it has not run
                slot.begun.pop()
            if sound or len(slot.begun) <= 1:
                yield self._settled(slot, result)
            else:
                slot.task = again(task, slot.policy, slot.begun, f"{result.verdict} ({result.detail})")
            if not sound:  # it computes nothing any more that could be believed
                process.end()
                self._forget(slot)
                self._requeue(slot)
        elif message["done"] == task.case.id and not task.policies:
            slot.task = None
        else:
            raise ValueError(f"{sorted(message)} out of turn")

    def _greeted(self, message: Mapping[str, Any]) -> dict[str, Target]:
        greeting = heard(message, self.plan.plugin)
        if self.greeting is not None and greeting.identity != self.greeting.identity:
            what = "two workers found different backends, devices or code"
            raise HalError("UNAVAILABLE", what, value=message["device"], fix="use equal devices only, and edit nothing")
        self.greeting, self._failed_starts = self.greeting or greeting, 0
        self._targets = {t.policy: t for t in self.greeting.targets}
        return {t.policy: t for t in greeting.targets}

    # --- what becomes of a case whose worker is gone -----------------------------------------------------------------

    def _lost(self, slot: _Slot, ending: Ending) -> Iterator[Result]:
        task, used = slot.task, len(slot.begun) - bool(slot.policy)
        if task is None or not task.policies:  # it was judging nothing
            slot.task = None
            if slot.begun:
                self.incidents.append(idle(slot.begun, ending, self.plan.seconds(slot.begun[-1][0])))
            else:
                self._not_started(ending)
            return
        seconds = self.plan.seconds(task.case)
        if used:
            kind, _, detail = verdict(ending, seconds)
            slot.task = again(task, slot.policy, slot.begun, f"{kind} ({detail})")
        elif slot.policy:
            yield self._settled(slot, blamed(task.case, self._targets[slot.policy], self.plan.seed, ending, seconds))
        else:
            yield from unprepared(task, self._targets, self.plan.seed, ending)
            slot.task = None
        self._requeue(slot)

    def _settled(self, slot: _Slot, result: Result) -> Result:
        """A result that stands; its kernel is done with."""
        assert slot.task is not None
        slot.task, told, incident = settled(slot.task, result)
        slot.policy = ""
        if incident is not None:
            self.incidents.append(incident)
        return told

    def _requeue(self, slot: _Slot) -> None:
        """What is left of a task is the first that the next worker gets."""
        rest = slot.task and left(slot.task, slot.policy)
        if rest:
            slot.own.append(rest)
        slot.task, slot.policy = None, ""

    def _not_started(self, ending: Ending) -> None:
        """Try again, a few times; but a worker that never was is the backend's fault, and says so at once."""
        self._failed_starts += 1
        if self.greeting is not None and self._failed_starts < STARTS:
            return
        how = f"did not start within {START:g} s{place(ending.log)}" if ending.late else ending.verdict[2]
        last = ending.log.splitlines()[-1:] or ["nothing"]
        what = f"the worker process of backend {self.plan.backend or self.plan.plugin} cannot be started: {how}; "
        what += f"its last words: {last[0][:200]}"
        # The doctor looks at what is installed, and never sees a plugin that is given.
        fix = f"mend {self.plan.plugin}" if self.plan.plugin else "run `glm5-hal doctor`"
        raise HalError("UNAVAILABLE", what, value=self.plan.backend or self.plan.plugin, fix=fix)
