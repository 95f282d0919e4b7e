"""What workers are to do, and how: the plan, a case with the kernels that it is still to be judged on, and what goes
wrong there that is no case's verdict."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.process import memory
from glm5_hal.errors import HalError

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

    def seconds(self, case: Case) -> float:
        """What a kernel has for a case."""
        return self.timeout or TIMEOUTS[case.sample.level]

    def preparing(self, case: Case) -> float:
        """What the suite has for a case before a kernel runs."""
        return PREPARING * max(self.seconds(case), TIMEOUTS[case.sample.level])

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
    """A worker that was damaged, and not by the case that it was judging: that one failed after others (``company``,
    the last of them last) and not alone; or, ``idle``, it was judging none when it ended, and this is the last that
    had run in it. ``before`` says how."""

    case: Case
    policy: str
    before: str
    company: tuple[tuple[Case, str], ...]
    idle: bool = False

    @property
    def remark(self) -> str:
        """What is told of it beside the case's own result."""
        if self.idle:
            others = f" and {len(self.company)} other kernels" if self.company else ""
            return f"its worker gave {self.before} when it{others} had run there and none was running"
        last, policy = self.company[-1]
        return f"it gave {self.before} after {len(self.company)} other kernels, the last {last.id} on {policy}"
