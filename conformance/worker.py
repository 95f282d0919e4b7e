"""The worker's side: judge one case after another on every target, and say what is being done before it is done.

Whatever a kernel does to this process is the runner's to see, from outside; see `glm5_hal.conformance.pool`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from glm5_hal.conformance import drawing, identity, replay, runner
from glm5_hal.conformance.cases import Case, cases
from glm5_hal.conformance.greeting import said
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.subject import prepared
from glm5_hal.conformance.target import Target, fields_of, targets
from glm5_hal.conformance.wire import Channel
from glm5_hal.errors import HalError


def serve(channel_fd: int, job: dict[str, Any]) -> None:
    """Answer with the targets, then judge what is asked for until the channel closes."""
    channel = Channel(socket.socket(fileno=channel_fd))
    log = os.dup(2)  # stays ours whatever a kernel does to its stderr
    faulthandler.enable(log)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with suppress(OSError):  # of all processes, the machine may best lose this one
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    try:
        judged = targets(job["backend"], job["device"], job["plugin"])
    except HalError as no:
        channel.send({"refused": {"code": no.code, "what": no.what, "value": str(no.value), "fix": no.fix}})
        return
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    if job["memory"] and judged[0].device.split(":")[0] == "cpu":
        _limit(job["memory"])
    channel.send(said(judged, identity.of_backend(judged[0])))
    by_policy, outputs = {t.policy: t for t in judged}, _Outputs()
    while (order := channel.receive()) is not None:
        case = _case(order)
        subject = prepared(case, order["seed"])
        for policy in order["policies"]:
            os.write(log, f"\n{job['marker']}\n".encode())
            channel.send({"begin": policy})
            faulthandler.dump_traceback_later(order["dump_after"], file=log)
            result = _judged(subject, case, by_policy[policy], order["seed"], outputs)
            faulthandler.cancel_dump_traceback_later()
            sound = result.ok or _sound(result, by_policy[policy].device)
            channel.send({"result": json.loads(result.as_json()), "sound": sound})
            if not sound:
                break
        channel.send({"done": case.id})


def _case(order: Mapping[str, Any]) -> Case:
    if order["file"]:
        return replay.case(order["file"])
    return drawing.of_record(order["point"]) if order["point"] else _cases()[order["case"]]


@cache
def _cases() -> dict[str, Case]:
    return {case.id: case for case in cases("full")}


def _judged(subject: Any, case: Case, target: Target, seed: int, outputs: _Outputs) -> Result:
    try:
        result = runner.run_case(subject, case, target, seed)
    except KeyboardInterrupt:  # a worker hears no terminal: the kernel raised it
        fields = fields_of(case, target, seed)
        result = Result(**fields, verdict="FAIL", code="RAISED", detail="KeyboardInterrupt")
    damage = outputs.damage()
    return replace(result, verdict="CRASH", code="STDOUT", detail=damage) if damage else result


class _Outputs:
    """The process's stdout and stderr: a kernel may write to them, not close or replace them."""

    def __init__(self) -> None:
        self._streams = sys.stdout, sys.stderr
        self._files = [self._file(fd) for fd in (1, 2)]

    def damage(self) -> str:
        """What is no longer as it was, in words."""
        for fd, name, was in zip((1, 2), ("stdout", "stderr"), self._files, strict=True):
            stream = getattr(sys, name)
            if self._file(fd) != was or stream is not self._streams[fd - 1] or stream.closed:
                return f"closed or replaced its process's {name}"
        return ""

    @staticmethod
    def _file(fd: int) -> tuple[int, int] | None:
        try:
            found = os.fstat(fd)
        except OSError:
            return None
        return found.st_dev, found.st_ino


def _sound(result: Result, device: str) -> bool:
    """Whether this process can be trusted with another case: its device computes, and there is memory for it. An ERROR
    of the suite itself may come of what a kernel did before."""
    if result.verdict in ("OOM", "CRASH", "ERROR") or "AcceleratorError" in result.detail:
        return False
    try:
        return torch.zeros(1, device=device).add_(1).item() == 1
    except Exception:  # noqa: BLE001 - whatever a lost device raises
        return False


def _limit(budget: int) -> None:
    """May map ``budget`` bytes more than now. Reservations count too: this is address space, which every kernel of the
    operating system enforces, and from which shared memory does not escape."""
    try:
        mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = mapped + budget
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))
