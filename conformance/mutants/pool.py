"""Jobs in worker processes that may be lost: a mutant may loop for ever, or take its process down.

Parent and worker speak JSON, a line each: a job down, any number of beats and one answer up. A worker that is silent
for longer than the deadline is killed, and its job has the answer "hang"; one that dies has the answer "crash".
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

Job = Mapping[str, Any]
Answer = Mapping[str, Any]

#: Silence of a worker until its first beat: it imports torch.
START = 120.0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    noise: IO[bytes]
    job: Job | None = None
    heard: bytes = b""
    last: float = field(default_factory=time.monotonic)
    fresh: bool = True


def run(
    jobs: Iterable[Job], workers: int, deadline: float, serve: str = "glm5_hal.conformance.mutants.worker"
) -> Iterator[tuple[Job, Answer]]:
    """Every job with its answer, as they come.

    ``deadline``: seconds that a worker may be silent. ``serve``: the module whose ``main`` answers jobs.
    """
    waiting, crew = deque(jobs), list[_Worker]()
    with selectors.DefaultSelector() as events:
        try:
            while waiting or any(w.job for w in crew):
                while waiting and len(crew) < workers:
                    crew.append(_hired(events, serve))
                for worker in crew:
                    if worker.job is None and waiting:
                        _give(worker, waiting.popleft())
                for key, _ in events.select(timeout=0.2):
                    answered = _listen(key.data, key.fileobj)
                    if answered is not None:
                        yield answered
                for worker in [w for w in crew if _lost(w, deadline)]:
                    crew.remove(worker)
                    how = "crash" if worker.process.poll() is not None else "hang"
                    detail = _ending(worker, how, deadline)
                    _dismiss(worker, events)
                    if worker.job is None:
                        raise RuntimeError(f"a worker did not start: {detail}")
                    yield worker.job, {"lost": how, "detail": detail}
        finally:
            for worker in crew:
                _dismiss(worker, events)


def _hired(events: selectors.BaseSelector, serve: str) -> _Worker:
    path = [entry for entry in sys.path if isinstance(entry, str)]
    boot = f"import sys; sys.path[:] = {path!r}; import {serve} as worker; worker.main()"
    command = [sys.executable, "-c", boot]
    noise = tempfile.TemporaryFile()  # noqa: SIM115 - closed with its worker
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, start_new_session=True
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    worker = _Worker(process, noise)
    events.register(process.stdout, selectors.EVENT_READ, worker)
    return worker


def _give(worker: _Worker, job: Job) -> None:
    worker.job, worker.last = job, time.monotonic()
    assert worker.process.stdin is not None
    try:
        worker.process.stdin.write(json.dumps(job).encode() + b"\n")
        worker.process.stdin.flush()
    except BrokenPipeError:  # it is dead, and found so in a moment
        return


def _listen(worker: _Worker, pipe: Any) -> tuple[Job, Answer] | None:
    stream: IO[bytes] = pipe
    worker.heard += os.read(stream.fileno(), 1 << 20)
    worker.last, worker.fresh, answer = time.monotonic(), False, None
    *lines, worker.heard = worker.heard.split(b"\n")
    for line in lines:
        said = json.loads(line)
        if "answer" in said and worker.job is not None:
            answer, worker.job = (worker.job, said["answer"]), None
    return answer


def _lost(worker: _Worker, deadline: float) -> bool:
    if worker.process.poll() is not None:
        return True
    return worker.job is not None and time.monotonic() - worker.last > (START if worker.fresh else deadline)


def _dismiss(worker: _Worker, events: selectors.BaseSelector) -> None:
    assert worker.process.stdout is not None
    assert worker.process.stdin is not None
    if worker.process.stdout in events.get_map():
        events.unregister(worker.process.stdout)
    worker.process.kill()
    worker.process.wait()
    worker.process.stdout.close()
    worker.noise.close()
    try:
        worker.process.stdin.close()
    except BrokenPipeError:
        return


def _ending(worker: _Worker, how: str, deadline: float) -> str:
    if how == "hang":
        return f"silent for {deadline:g} s"
    worker.noise.seek(0)
    last = worker.noise.read().decode(errors="replace").strip().splitlines()[-1:]
    return f"its process ended with {worker.process.returncode} {' '.join(last)}".rstrip()
