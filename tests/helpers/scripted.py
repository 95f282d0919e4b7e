"""A worker without torch, for the runner's side of isolation: what becomes of a case is written in a script.

The script is the plan's ``plugin``: JSON, deeds by "case policy"; whatever it does not name passes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm5_hal.backend import Device
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.wire import Channel, frame
from glm5_hal.plugins.child import encoded

SERVE = "scripted:serve"


class Stage:
    """What a deed may touch."""

    def __init__(self, channel: Channel, job: dict[str, Any]) -> None:
        self.channel, self.job, self.poisoned, self.spoilt, self.judged = channel, job, False, False, 0


def serve(fd: int, job: dict[str, Any]) -> None:
    stage = Stage(Channel(socket.socket(fileno=fd)), job)
    script = json.loads(job["plugin"] or "{}")
    if "start" in script:
        DEEDS[script["start"]](stage)
    facts = encoded(Device("cpu", "nothing", "none", evidence="simulated"))
    hello = {"hello": 1, "backend": "scripted", "providers": ["a", "b"], "device": "cpu", "facts": facts}
    hello |= {"threads": 1, "waivers": ("", "")}
    stage.channel.send({**hello, "identity": {"device": job["device"] if script.get("differ") else ""}})
    while (order := stage.channel.receive()) is not None:
        if order["case"] in script:
            DEEDS[script[order["case"]]](stage)
        for policy in order["policies"]:
            os.write(2, f"{job['marker']}\n".encode())
            stage.channel.send({"begin": policy})
            said = DEEDS[script.get(f"{order['case']} {policy}", "pass")](stage) or {}
            if stage.poisoned:
                said = {"verdict": "FAIL", "code": "KERNEL", "detail": "device lost"}
            stage.judged += 1
            passed = Result(
                order["case"], "x", policy, policy, "PASS", "simulated", "nothing", "float32", "smoke", 0, ""
            )
            result = json.loads(passed.as_json()) | {"detail": f"by {os.getpid()}", **said}
            stage.channel.send({"result": result, "sound": not stage.poisoned and result["verdict"] != "OOM"})
            if stage.poisoned:
                break
        stage.channel.send({"done": order["case"]})


def hang(stage: Stage) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(1000)


def segv(stage: Stage) -> None:
    os.write(2, b"about to fall\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def later(stage: Stage) -> None:
    threading.Timer(0.3, os.abort).start()


def exit_afterwards(stage: Stage) -> None:
    """The answer is sent, and that it was the last one is not."""
    send = stage.channel.send

    def last(message: Any) -> None:
        send(message)
        if "result" in message:
            os._exit(3)

    stage.channel.send = last  # type: ignore[method-assign]


def starve(stage: Stage) -> None:
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


def poison(stage: Stage) -> None:
    stage.poisoned = True


def leave(stage: Stage) -> None:
    """A child in the worker's group, and one that has left it; their pids in a file."""
    for away in (False, True):
        child = os.fork()
        if child == 0:
            if away:
                os.setsid()
                if os.fork():
                    os._exit(0)
            with Path(os.environ["LEFT_BEHIND"]).open("a", encoding="ascii") as out:
                out.write(f"{os.getpid()}\n")
            time.sleep(1000)
    while len(Path(os.environ["LEFT_BEHIND"]).read_text(encoding="ascii").split()) < 2:
        time.sleep(0.01)


def leave_and_hang(stage: Stage) -> None:
    leave(stage)
    with Path(os.environ["LEFT_BEHIND"]).open("a", encoding="ascii") as out:
        out.write(f"{os.getpid()}\n")
    hang(stage)


def exit_once(stage: Stage) -> None:
    """Only a worker that has judged something dies."""
    if stage.judged:
        os._exit(0)


def fork_and_return(stage: Stage) -> None:
    """Both processes go on; the child's answers must not be heard."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    else:
        stage.channel.send({"nonsense": 1})
        os._exit(0)


def shout(stage: Stage) -> None:
    """More than any pipe holds, none of it text."""
    sys.stdout.buffer.write(bytes(range(256)) * 8192)
    sys.stdout.buffer.flush()


def spoil(stage: Stage) -> None:
    stage.spoilt = True


def allocate(stage: Stage) -> None:
    if stage.spoilt:
        os.abort()


def abort_once(stage: Stage) -> None:
    """The first time on this machine."""
    flag = Path(os.environ["ABORTED_ONCE"])
    if not flag.exists():
        flag.touch()
        os.abort()


def abort_once_later(stage: Stage) -> None:
    if not Path(os.environ["ABORTED_ONCE"]).exists():
        threading.Timer(0.3, abort_once, [stage]).start()


DEEDS: dict[str, Callable[[Stage], Any]] = {
    "pass": lambda stage: None,
    "fail": lambda stage: {"verdict": "FAIL", "code": "accuracy", "detail": "wrong"},
    "refuse": lambda stage: {"verdict": "UNSUPPORTED", "code": "DTYPE"},
    "out of memory": lambda stage: {"verdict": "OOM"},
    "hang": hang,
    "segv": segv,
    "abort later": later,
    "abort": lambda stage: os.abort(),
    "exit afterwards": exit_afterwards,
    "exit 0": lambda stage: os._exit(0),
    "starve": starve,
    "kill itself": lambda stage: os.kill(os.getpid(), signal.SIGKILL),
    "kill its group": lambda stage: os.killpg(0, signal.SIGTERM),
    "kill its parent": lambda stage: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(1000)),
    "kill its parent's group": lambda stage: (os.killpg(os.getpgid(os.getppid()), signal.SIGKILL), time.sleep(1000)),
    "stop": lambda stage: os.kill(os.getpid(), signal.SIGSTOP),
    "close every file": lambda stage: (os.closerange(0, 1000), time.sleep(1000)),
    "bytes": lambda stage: stage.channel.socket.sendall(b"no frame at all"),
    "no json": lambda stage: stage.channel.socket.sendall(frame({}).replace(b"{}", b"{[")),
    "another case's result": lambda stage: {"case": "another"},
    "a verdict that is none": lambda stage: {"verdict": "GREAT"},
    "a number that is none": lambda stage: {"seconds": "soon"},
    "a message unasked": lambda stage: stage.channel.send({"done": "nothing"}),
    "poison": poison,
    "poison the next": lambda stage: threading.Timer(0.2, poison, [stage]).start(),
    "leave children": leave,
    "fork and return": fork_and_return,
    "shout": shout,
    "spoil the heap": spoil,
    "fail and spoil": lambda stage: spoil(stage) or {"verdict": "FAIL", "code": "accuracy"},
    "allocate": allocate,
    "abort once": abort_once,
    "abort once, later": abort_once_later,
    "pause": lambda stage: time.sleep(1.0),
    "exit 0 once": exit_once,
    "leave children and hang": leave_and_hang,
}
