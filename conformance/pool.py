"""Cases in worker processes: whatever a kernel does to its process ends its case, and the run goes on.

A worker is started once and reused. A case that dies, hangs, runs out of memory or loses the device in a used worker is
tried again in a fresh one, and blamed only if it fails there too: what an earlier kernel damaged is not its fault.
"""

from __future__ import annotations

import os
import selectors
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from glm5_hal.backend import Device
from glm5_hal.conformance import drawing
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.process import SERVE, Ending, Process, memory, place
from glm5_hal.conformance.results import Result, from_record
from glm5_hal.conformance.runner import Target, fields_of
from glm5_hal.errors import HalError
from glm5_hal.plugins.child import decoded

#: Seconds that one case may take on one kernel, by its level.
TIMEOUTS = {"smoke": 60.0, "standard": 300.0, "full": 1800.0}

#: Seconds that a worker may take to start: torch, the plugin, its probe and its kernels.
START = 180.0

#: The suite's own work on a case, its inputs and its oracle, may take this many times as long as a kernel by default.
PREPARING = 10

#: A worker that cannot be started this often in a row will not be.
STARTS = 3


@dataclass(frozen=True)
class Plan:
    """How to run. ``timeout`` None is by level; ``memory`` in GiB per worker, None is by what is free, 0 is no limit;
    ``threads`` None leaves torch's own."""

    backend: str
    plugin: str = ""
    devices: tuple[str | None, ...] = (None,)
    workers: int = 0
    seed: int = 0
    timeout: float | None = None
    memory: float | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.workers and self.workers < len(self.devices):
            what = f"{self.workers} workers cannot use {len(self.devices)} devices"
            raise HalError("CONFIG", what, value=self.workers, fix=f"--workers {len(self.devices)}, or more")
        if not hasattr(os, "fork"):
            what = "worker processes need an operating system that can fork"
            raise HalError("CONFIG", what, value=os.name, fix="run with --in-process")

    @property
    def count(self) -> int:
        return self.workers or len(self.devices)

    def job(self, place: int) -> dict[str, Any]:
        """What the worker at ``place`` is told at its start."""
        share = 0.9 * memory()[1] / self.count if self.memory is None else self.memory * 2**30
        shared = max(1, (os.cpu_count() or 1) // self.count) if self.count > 1 else None
        return {
            "backend": self.backend,
            "plugin": self.plugin,
            "device": self.devices[place % len(self.devices)],
            "threads": self.threads or shared,
            "memory": int(min(share, 2**62)),
        }


@dataclass(frozen=True)
class Task:
    """A case, and the policies of the kernels that it still has to be judged on. ``before`` says how the first of them
    ended in a used worker, ``company`` what had run there."""

    case: Case
    policies: tuple[str, ...]
    before: str = ""
    company: tuple[tuple[Case, str], ...] = ()


@dataclass(frozen=True)
class Incident:
    """A case that failed after others (``company``, the last of them last) and not alone. ``before`` says how."""

    case: Case
    policy: str
    before: str
    company: tuple[tuple[Case, str], ...]


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
        self.identity: Mapping[str, Any] = {}
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

    def targets(self) -> list[Target]:
        """What the backend's name stands for. Raises HalError as `runner.targets` does."""
        while not self._targets:
            for _ in self._turn():
                pass
        return list(self._targets.values())

    def run(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """Every task's results, as they come."""
        waiting = deque(tasks)
        while waiting or any(slot.task or slot.own for slot in self._slots):
            for slot in self._slots:
                self._assign(slot, waiting)
            yield from self._turn()

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
        seconds = self._seconds(slot.task.case)
        slot.deadline = time.monotonic() + PREPARING * max(seconds, TIMEOUTS[slot.task.case.sample.level])
        order = {
            "case": slot.task.case.id,
            "file": slot.task.case.file,
            "point": drawing.as_record(slot.task.case) if slot.task.case.point else None,
            "policies": slot.task.policies,
            "seed": self.plan.seed,
        }
        slot.process.send({**order, "dump_after": max(0.8 * seconds, seconds - 2)})

    def _seconds(self, case: Case) -> float:
        return self.plan.timeout or TIMEOUTS[case.sample.level]

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
            slot.deadline = time.monotonic() + self._seconds(task.case)
        elif "result" in message:
            result, sound = from_record(message["result"]), message["sound"] is True
            if (result.case, result.backend) != (task.case.id, slot.policy):
                raise ValueError(f"a result of {result.case!r} on {result.backend!r}")
            if result.verdict == "UNSUPPORTED":  # it has not run
                slot.begun.pop()
            if sound or len(slot.begun) <= 1:
                yield self._settled(slot, result)
            else:
                slot.task = self._again(slot, task, f"{result.verdict} ({result.detail})")
            if not sound:  # it computes nothing any more that could be believed
                process.end()
                self._forget(slot)
                self._requeue(slot)
        elif message["done"] == task.case.id and not task.policies:
            slot.task = None
        else:
            raise ValueError(f"{sorted(message)} out of turn")

    def _greeted(self, message: Mapping[str, Any]) -> dict[str, Target]:
        facts = decoded(message["facts"])
        if not isinstance(facts, Device):
            raise ValueError("no device")
        made = [Target(message["backend"], p, message["device"], facts, self.plan.plugin) for p in message["providers"]]
        if self.identity and message["identity"] != self.identity:
            what = "two workers found different backends, devices or code"
            raise HalError("UNAVAILABLE", what, value=message["device"], fix="use equal devices only, and edit nothing")
        self.identity, self._failed_starts = message["identity"], 0
        self._targets = self._targets or {t.policy: t for t in made}
        return {t.policy: t for t in made}

    # --- what becomes of a case whose worker is gone -----------------------------------------------------------------

    def _lost(self, slot: _Slot, ending: Ending) -> Iterator[Result]:
        if slot.task is None:
            if not slot.begun:
                self._not_started(ending)
            return
        task, used = slot.task, len(slot.begun) - bool(slot.policy)
        seconds = self._seconds(task.case)
        verdict, code, detail = ending.verdict
        if ending.late:
            verdict, code, detail = "HANG", "TIMEOUT", f"did not end within {seconds:g} s{place(ending.log)}"
        if used:
            slot.task = self._again(slot, task, f"{verdict} ({detail})")
        elif slot.policy:
            fields = fields_of(task.case, self._targets[slot.policy], self.plan.seed)
            fields |= {"verdict": verdict, "code": code, "detail": detail, "log": ending.log}
            yield self._settled(slot, Result(**fields, seconds=seconds if ending.late else 0.0))
        else:  # no kernel has run in this process
            said = f"preparing the case took too long{place(ending.log)}" if ending.late else detail
            for policy in task.policies:
                fields = fields_of(task.case, self._targets[policy], self.plan.seed)
                what = f"the suite itself failed: {said}"
                yield Result(**fields, verdict="ERROR", code="CONTRACT", detail=what, log=ending.log)
            slot.task = None
        self._requeue(slot)

    def _settled(self, slot: _Slot, result: Result) -> Result:
        """A result that stands; its kernel is done with."""
        assert slot.task is not None
        was, left = slot.task, tuple(p for p in slot.task.policies if p != slot.policy)
        slot.task, slot.policy = replace(was, policies=left, before="", company=()), ""
        if was.before.split(" ")[0] in ("", result.verdict):
            return result
        self.incidents.append(Incident(was.case, result.backend, was.before, was.company))
        last, policy = was.company[-1]
        said = f"it gave {was.before} after {len(was.company)} other kernels, the last {last.id} on {policy}"
        return replace(result, remark=said)

    def _requeue(self, slot: _Slot) -> None:
        """What is left of a task is the first that the next worker gets, its unlucky kernel first."""
        task, slot.task = slot.task, None
        if task is not None and task.policies:
            rest = tuple(p for p in task.policies if p != slot.policy)
            slot.own.append(replace(task, policies=(slot.policy, *rest) if slot.policy else rest))
        slot.policy = ""

    @staticmethod
    def _again(slot: _Slot, task: Task, before: str) -> Task:
        company = tuple(slot.begun[:-1] if slot.policy else slot.begun)
        return replace(task, before=before, company=company)

    def _not_started(self, ending: Ending) -> None:
        """Try again, a few times; but a worker that never was is the backend's fault, and says so at once."""
        self._failed_starts += 1
        if self.identity and self._failed_starts < STARTS:
            return
        how = f"did not start within {START:g} s{place(ending.log)}" if ending.late else ending.verdict[2]
        last = ending.log.splitlines()[-1:] or ["nothing"]
        what = f"the worker process of backend {self.plan.backend or self.plan.plugin} cannot be started: {how}; "
        what += f"its last words: {last[0][:200]}"
        raise HalError("UNAVAILABLE", what, value=self.plan.backend, fix="run `glm5-hal doctor`")
