"""What comes of compiling a kernel: what it needs of the chip, or why it does not compile."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

#: Of one compilation whose compiler crashes.
TRIES = 4


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs of a multiprocessor.

    Attributes:
        seconds: to compile; next to nothing where it had been compiled before.
        registers: of a thread.
        spilled: registers of a thread, of 4 bytes, that lie in memory instead.
        scalars_spilled: registers of a wavefront that lie in lanes of others; no memory is used for them.
        shared: bytes of shared memory of a program.
        matrix: the instructions that multiply matrices, "" where there are none.
        crashes: how often its compiler was killed by a signal before it compiled.
    """

    kernel: str
    seconds: float
    registers: int = 0
    spilled: int = 0
    scalars_spilled: int = 0
    shared: int = 0
    matrix: str = ""
    num_warps: int = 0
    num_stages: int = 0
    crashes: int = 0


def on_failure(failed: Callable[[str, Exception], None]) -> None:
    """From here on, tell ``failed`` (and no one before it) of every kernel that does not compile: its name, and why. It
    is passed over, so that what its host function launches after it is tried too."""
    from triton.runtime.jit import JITFunction

    original = getattr(JITFunction.run, "__wrapped__", JITFunction.run)

    @wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except Exception as problem:  # noqa: BLE001 - a compiler raises what it likes
            return failed(self.fn.__name__, problem)

    JITFunction.run = run


def outliving(compiler: Callable[[], Any]) -> tuple[Any, int]:
    """What a compiler in a process of its own makes, and how often it crashed before.

    triton-ascend 3.2.0 reads memory that it has freed: of some kernels about one run in a hundred ends with a signal
    and the next run of the same kernel does not. An error that the compiler reports is not tried again.

    Raises:
        RuntimeError: it crashed every time.
    """
    for crashes in range(TRIES):
        try:
            return compiler(), crashes
        except subprocess.CalledProcessError as problem:
            if problem.returncode >= 0:
                raise
            how = signal.Signals(-problem.returncode).name
    raise RuntimeError(f"its compiler crashed {TRIES} times of {TRIES}, at last by {how}")


def words(problem: Exception) -> str:
    """What a compiler's exception says, in one line: less the source that Triton puts before it, and any stack."""
    root = problem.__cause__ or problem
    lines = [line.strip() for line in str(root).splitlines() if line.strip() and not line.startswith(("///", "[INFO]"))]
    said = next((line for line in lines if "error: " in line or "Assertion" in line), lines[-1] if lines else "")
    if "Assertion" in said:
        said = said.rpartition("/")[2]  # a path of the machine that the compiler was built on
    where = re.search(r"^at (\d+):", str(problem), re.MULTILINE)
    return f"{type(root).__name__}{f' at its line {where[1]}' if where else ''}: {said}"
