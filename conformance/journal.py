"""What is finished stays finished: results on disk as they come, and a run that goes on where it was cut off.

In the folder of a run: ``run.json`` says which run it is, ``results.partial.jsonl`` grows line by line, and at the end
``results.jsonl`` holds every result once, in case order. Whatever ends the runner, one of the last two is right.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from glm5_hal.conformance.bundle.manifest import now
from glm5_hal.conformance.folder import BUNDLE, RUN
from glm5_hal.conformance.identity import differences
from glm5_hal.conformance.results import Result, from_record
from glm5_hal.errors import HalError

#: Seconds of results that a power cut may cost; the death of the runner costs none.
SYNC = 1.0

#: A case's id and the policy of the kernel that was judged on it.
Key = tuple[str, str]


class Journal:
    """The results of one run, by case and policy, and when it was begun, however often it was gone on with."""

    def __init__(self, folder: Path, file: BinaryIO, results: dict[Key, Result], started: str) -> None:
        self.folder, self.results, self.started = folder, results, started
        self._file, self._synced = file, 0.0

    def add(self, result: Result) -> None:
        """Keep a result, on disk too."""
        self.results[result.case, result.backend] = result
        with writable(self.folder):
            self._file.write(result.as_json().encode() + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > SYNC:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def finish(self, keys: Sequence[Key], judged: Callable[[Result], Result] = lambda result: result) -> list[Result]:
        """Write ``results.jsonl``: every one of ``keys``, once, in this order, as ``judged`` has it."""
        ordered = [judged(self.results[key]) for key in keys]
        with writable(self.folder):
            _write(self.folder / "results.jsonl", "".join(r.as_json() + "\n" for r in ordered))
        return ordered


@contextmanager
def opened(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[Journal]:
    """The journal of a run, begun afresh or gone on with. After `Journal.finish` nothing partial is left.

    Raises:
        HalError: CONFIG where the folder holds another run than the one to be resumed (the differences are named), or
            another runner is at work in it.
    """
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        run, partial, whole = (folder / name for name in (RUN, "results.partial.jsonl", "results.jsonl"))
        results: dict[Key, Result] = {}
        started = now()
        if resume and run.exists():
            was = json.loads(run.read_text(encoding="utf-8"))
            started = str(was.pop("started", started))
            _check(folder, was, identity)
            results = _complete_lines(whole if whole.exists() else partial)
        elif resume and (partial.exists() or whole.exists()):
            what = f"{folder} holds results and no run.json, so nothing says of what run"
            raise HalError("CONFIG", what, value=str(folder), fix="run without --resume, or into another --out")
        else:
            with writable(folder):
                for path in (*(folder / name for name in BUNDLE), partial, run):
                    path.unlink(missing_ok=True)
                _write(run, json.dumps({"started": started, **identity}, indent=2, ensure_ascii=False) + "\n")
        with writable(folder):
            file = partial.open("ab")
        with file:
            yield Journal(folder, file, results, started)
        if whole.exists():
            partial.unlink(missing_ok=True)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """A disk that is full or not ours is HalError("CONFIG")."""
    try:
        yield
    except OSError as problem:
        what = f"cannot write to {folder}: {problem}"
        raise HalError("CONFIG", what, value=str(folder), fix="choose another --out") from None


def _check(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    found = differences(was, json.loads(json.dumps(now)))
    if found:
        what = f"{folder} holds another run: {'; '.join(found)}"
        raise HalError("CONFIG", what, value=found, fix="run it as it was, or without --resume, or into another --out")


def _complete_lines(path: Path) -> dict[Key, Result]:
    """The results in a journal. A last line that was torn off is cut from the file, as if it had never been begun."""
    if not path.exists():
        return {}
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        os.truncate(path, len(whole) + 1 if whole else 0)
    found = {}
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            result = from_record(json.loads(line))
        except (ValueError, RecursionError) as problem:
            what = f"{path}, line {number} is no result ({problem})"
            raise HalError("CONFIG", what, value=number, fix="run without --resume, or into another --out") from None
        found[result.case, result.backend] = result
    return found


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whatever happens meanwhile."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    beside.replace(path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else writes into this folder, where the operating system can see to it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"another run is writing into {folder}"
            raise HalError("CONFIG", what, value=str(folder), fix="wait for it, or choose another --out") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
