"""Two threads at once, each on inputs of its own, get what each gets alone; and so does a process after a fork.

First the threads take turns, torch operation by torch operation, so that what they share shows every time; then both
run freely.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import copy_context
from typing import Any

import torch

from glm5_hal import context
from glm5_hal.conformance.checks.agreement import as_good
from glm5_hal.conformance.intercept import Around, operations
from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Finding, Trial

#: How many operations of each thread are taken in turn: longer kernels are loops over the same ones.
TAKEN = 200

#: How long a thread waits for its turn before both run freely: the kernel may hold a lock, which is right of it.
PATIENCE = 0.1

#: How long a child may take, in seconds: it ran the same a moment ago.
CHILD = 10.0


def check(trial: Trial) -> Finding:
    if not trial.case.elected:
        return Finding(None, "looked at in one dtype of each small sample")
    if trial.other is None or trial.turned is None:
        return Finding(None, "this sample has no other inputs of the same shapes")
    after = _after_fork(trial) if _forks(trial) else ""
    if after:
        return Finding(False, f"after a fork: {after}")
    for what, turns in (("by turns", Turns()), ("at once", None)):
        runs = together(trial, (trial.inputs.args, trial.other), turns)
        for judged, run in zip((trial, trial.turned), runs, strict=True):
            finding = as_good(judged, run, f"two threads {what}", _same_threads(trial))
            if finding.failed:
                return finding
    return Finding(True)


def _same_threads(trial: Trial) -> bool:
    # On a CPU a product's bits may depend on how many threads share it: fewer do after a fork, or beside another call.
    return trial.device.split(":")[0] != "cpu" or torch.get_num_threads() == 1


def together(trial: Trial, each: tuple[Mapping[str, Any], Mapping[str, Any]], turns: Turns | None) -> list[Run]:
    """One run of the kernel on each of these arguments, in two threads that start together."""
    start, runs, raised = threading.Barrier(2), {}, []

    def work(me: int) -> None:
        placed = trial.place(each[me])
        try:
            with torch.inference_mode():
                start.wait(CHILD)
                with nullcontext() if turns is None else operations(turns.of(me)):
                    returned = trial.call(**placed)
                runs[me] = trial.bring_back(returned, placed)
        except BaseException as problem:  # noqa: BLE001 - raised again in the thread that judges
            raised.append(problem)
        finally:
            if turns is not None:
                turns.leave(me)

    threads = [threading.Thread(target=copy_context().run, args=(work, me)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return [runs[0], runs[1]]


class Turns:
    """Two threads of which one runs at a time, each up to its next torch operation."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._turn, self._taken = 0, 0
        self.free = False

    def of(self, me: int) -> Around:
        """What thread 0 or 1 does around its operations."""

        def around(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            if not self.free:
                self.take(me)
            return func(*args, **kwargs)

        return around

    def take(self, me: int) -> None:
        """Hand the turn over, and wait until it comes back."""
        with self._condition:
            self._turn, self._taken = 1 - me, self._taken + 1
            self.free |= self._taken > 2 * TAKEN
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: self.free or self._turn == me, PATIENCE):
                self.free = True
                self._condition.notify_all()

    def leave(self, me: int) -> None:
        with self._condition:
            self.free = True
            self._condition.notify_all()


def _forks(trial: Trial) -> bool:
    """Once per op, on the CPU: no device's driver survives a fork."""
    return trial.case.first and trial.device.split(":")[0] == "cpu" and hasattr(os, "fork")


def _after_fork(trial: Trial) -> str:
    catalogue, bits = context.catalogue(), _same_threads(trial)

    def answer() -> str:
        context._process.catalogue = catalogue  # what is installed is looked for anew after a fork
        torch.set_num_threads(1)  # a pool of threads does not survive a fork, and that is not the kernel's doing
        placed = trial.place(trial.inputs.args)
        finding = as_good(trial, trial.bring_back(trial.kernel.fn(**placed), placed), "", bits)
        return finding.detail if finding.failed else ""

    # A library's thread that was just ending may hold a lock of its own for ever: once is not the kernel's doing.
    return in_child(answer) and in_child(answer)


def in_child(answer: Callable[[], str]) -> str:
    """What ``answer`` says in a forked child, or how the child ended."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is what is tried here
        child = os.fork()
    if not child:
        try:
            os.write(writing, f"said {answer()}"[:4000].encode())
        except BaseException as problem:  # noqa: BLE001 - nothing may leave this process but its answer
            os.write(writing, f"said {type(problem).__name__}: {problem}"[:4000].encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        ready, _, _ = select.select([reading], [], [], CHILD)
        said = os.read(reading, 4096).decode() if ready else ""
    finally:
        os.close(reading)
        if not ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if said:
        return said.removeprefix("said ")
    return f"the child ended with status {status}" if ready else f"no answer within {CHILD:.0f} s"
