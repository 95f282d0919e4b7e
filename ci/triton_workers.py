"""Workers that compile the Triton kernels of one op, in one dtype, for every chip."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton_budgets import Target

if TYPE_CHECKING:
    from glm5_hal.backend import Kernel
    from glm5_hal.backends._triton.tuning import Tuning

ROOT = Path(__file__).resolve().parents[1]

#: Of activations.
DTYPES = ("bfloat16", "float16", "float32")

#: What plays the driver, by Triton's name of the backend.
STAND_INS = {"cuda": "triton_standin", "hip": "triton_standin", "npu": "triton_standin_ascend"}

_DEVICES = count()


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time."""

    op: str
    dtype: str
    targets: tuple[Target, ...]


@dataclass
class Found:
    """What became of kernels.

    Attributes:
        kernels: one row for each form that was tried: whose it is, its resources, and ``problem``, "" if it compiled.
        failures: what else went wrong, in words.
        taken: how many calls each kernel got, by target, op and provider.
        triton: the version of the compiler.
    """

    kernels: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    taken: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    triton: str = ""

    def add(self, other: Found) -> None:
        self.kernels += other.kernels
        self.failures += other.failures
        self.taken.update(other.taken)
        self.triton = other.triton or self.triton


def compiled(unit: Unit) -> Found:
    """Every kernel of an op in one dtype, for each target. Runs in a process that never interprets."""
    import torch
    import triton
    import triton_calls
    from triton_outcomes import Resources, on_failure, words

    from glm5_hal.backends import _triton
    from glm5_hal.backends._triton.tuning import tuning
    from glm5_hal.signature import Facts

    torch.set_num_threads(1)
    found = Found(triton=triton.__version__)
    new: list[dict[str, Any]] = []
    on_failure(lambda name, why: new.append({**asdict(Resources(name, 0.0)), "problem": words(why)}))
    given = [(call.id, call.arguments()) for call in triton_calls.calls(unit.op, unit.dtype)]
    for target in unit.targets:
        standin = import_module(STAND_INS[target.backend])
        standin.on_compile(lambda resources: new.append({**asdict(resources), "problem": ""}))
        # A device of its own, for a kernel that two ops share is both ops', whatever this process compiled before.
        standin.stand_in(target.backend, target.arch, target.warp_size, next(_DEVICES))
        files = [ROOT / target.tuning] if target.tuning and (ROOT / target.tuning).exists() else []
        tuned = tuning(target.name, *files)
        kernels = (*_triton.kernels(tuned), *_own(target, tuned))
        for kernel in (kernel for kernel in kernels if kernel.op == unit.op):
            about = {"target": target.name, "op": kernel.op, "provider": kernel.provider, "dtype": unit.dtype}
            taken = [(call, args) for call, args in given if triton_calls.takes(kernel, args, Facts(arch=target.name))]
            found.taken[target.name, kernel.op, kernel.provider] += len(taken)
            for call, args in taken:
                found.failures += [f"{target.name}: {call} {kernel.provider} {what}" for what in _made(kernel, args)]
                found.kernels += [{**about, "call": call, **one} for one in new]
                new.clear()
    return found


def _own(target: Target, tuned: Tuning) -> Iterator[Kernel]:
    from glm5_hal.backends._triton.declare import Declared

    if target.own:
        declared = vars(import_module(target.own)).values()
        yield from (one.bound(tuned) for one in declared if isinstance(one, Declared))


def _made(kernel: Kernel, args: Mapping[str, Any]) -> Iterator[str]:
    """Make a call: in words, what its host function raises, and what anything warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kernel.fn(**args)
        except Exception as problem:  # noqa: BLE001 - any will do
            yield f"raises {type(problem).__name__}: {problem}"
    yield from sorted({f"warns: {warning.message}" for warning in caught})


def gather(work: Callable[[Unit], Found], units: Sequence[Unit], jobs: int) -> Iterator[Found]:
    """What becomes of each unit. Where one takes its process down, those that are left get a process each."""
    left = set(units)
    with _pool(jobs) as pool:
        running = {pool.submit(work, unit): unit for unit in units}
        for future in as_completed(running):
            try:
                yield future.result()
            except BrokenProcessPool:
                break
            left.remove(running[future])
    for unit in (unit for unit in units if unit in left):
        try:
            with _pool(1) as pool:
                yield pool.submit(work, unit).result()
        except BrokenProcessPool:
            lost = f"{unit.op} {unit.dtype}: the compiler took its process down; its last words are on stderr"
            yield Found(failures=[lost])


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_silent)


def _silent() -> None:
    """Compilers print to stdout; that is the report's."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
