"""The kernel that the dispatcher chose ran, and computed the result itself, where its tensors are.

Every Python function that one run enters is noted. A kernel that enters a reference, the oracle, another kernel of the
same op or the op itself is a wrapper; calling torch, and other ops, is its own business. It is no security boundary: a
copy of the reference's source under another name is another function, and threads that were there before are not seen.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import CodeType, FrameType
from typing import Any

import torch

from glm5_hal import context, ops
from glm5_hal.backend import Kernel, Unavailable
from glm5_hal.backends import _torch
from glm5_hal.conformance import oracle
from glm5_hal.conformance.intercept import operations
from glm5_hal.conformance.trial import Finding, Trial
from glm5_hal.errors import HalError
from glm5_hal.ops._common import references


def check(trial: Trial) -> Finding:
    kernel, entered = trial.kernel, Entered()
    placed, host = trial.place(trial.inputs.args), Transfers(trial.device)
    with _noting(entered), nullcontext() if trial.device.split(":")[0] == "cpu" else operations(host):
        trial.call(**placed)
    own = code_of(kernel.fn)
    if own is not None and not entered.has(own):
        return Finding(False, f"the chosen kernel {kernel.provider} did not run")
    if entered.of_op(trial.spec.name) > 1:
        return Finding(False, f"calls glm5_hal.ops.{trial.spec.name}, the op that it is a kernel of")
    if kernel.provider != "reference":
        for code, what in _forbidden(trial):
            if entered.has(code):
                return Finding(False, f"runs {what}")
    return Finding(not host.moved, f"moves {', '.join(host.moved)} to the host" if host.moved else "")


def code_of(fn: Callable[..., Any]) -> CodeType | None:
    """What an interpreter enters when it calls ``fn``; None where that is no Python code."""
    while isinstance(fn, partial):
        fn = fn.func
    fn = getattr(fn, "__func__", fn)
    found = getattr(fn, "__code__", None) or getattr(type(fn).__dict__.get("__call__"), "__code__", None)
    return found if isinstance(found, CodeType) else None


class Entered:
    """Python code that was entered, and how often. By identity: code of the same text in another file is equal."""

    def __init__(self) -> None:
        self._times: dict[int, int] = {}
        self._codes: dict[int, CodeType] = {}

    def add(self, code: CodeType) -> None:
        self._codes[id(code)] = code  # kept, so that its id is nobody else's
        self._times[id(code)] = self._times.get(id(code), 0) + 1

    def has(self, code: CodeType) -> bool:
        return id(code) in self._times

    def of_op(self, op: str) -> int:
        """How often an op was called. Its functions are compiled anew whenever its table needs it: known by name."""
        return sum(
            self._times[key]
            for key, code in self._codes.items()
            if code.co_filename == f"<glm5_hal op {op}>" and code.co_name in ("__call__", "from_torch")
        )


@contextmanager
def _noting(entered: Entered) -> Iterator[None]:
    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            entered.add(frame.f_code)

    before, of_threads = sys.getprofile(), threading.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)
        threading.setprofile(of_threads)


def _forbidden(trial: Trial) -> list[tuple[CodeType, str]]:
    """What a kernel of this op must not enter, in words."""
    name, own = trial.spec.name, trial.kernel
    found: list[tuple[Callable[..., Any], str]] = [(f, "the suite's oracle") for f in (oracle.truth, oracle.emulation)]
    for op, spec in ops.specs().items():
        if not spec.composite:  # a composite's body runs whenever another op's kernel calls the composite
            found.append((spec.reference, f"glm5_hal's reference of {op}"))
        if spec.emulate is not None and not spec.composite:
            found.append((spec.emulate, f"glm5_hal's emulation of {op}"))
    if own.provider != "composite":
        found.append((trial.spec.reference, f"glm5_hal's reference of {name}"))
    found += [(fn, "glm5_hal's references") for fn in (references.reference_of, references.loosest(_nothing))]
    found += [
        (kernel.fn, f"{whose}:{kernel.provider}, another kernel of {name}")
        for whose, kernel in _kernels_of(name)
        if kernel.provider != "composite" and code_of(kernel.fn) is not code_of(own.fn)
    ]
    return [(code, what) for fn, what in found if (code := code_of(fn)) is not None]


def _nothing() -> None: ...


def _kernels_of(op: str) -> Iterator[tuple[str, Kernel]]:
    """The kernels of an op: of the built-in backends, of the one that is judged, and the shared ones. Other plugins are
    not loaded for this: they may break the process."""
    catalogue, policy = context.catalogue(), context.effective()[0]
    names = [record.name for record in catalogue.found if record.builtin]
    names += [target.backend for target in policy.targets(op) if target.backend in catalogue.names]
    for record in map(catalogue.record, dict.fromkeys(names)):
        if record.status == "ok" and not isinstance(catalogue.device(record.name), Unavailable):
            try:
                yield from ((record.name, kernel) for kernel in catalogue.kernels(record.name, op))
            except HalError:  # a broken plugin, which is nobody's kernel
                continue
    yield from (("backends._torch", kernel) for kernel in _torch.kernels() if kernel.op == op)


class Transfers:
    """Notes numbers that leave their device for the host. Lengths and indices may: some vendors take Python lists."""

    def __init__(self, device: str) -> None:
        self._type = device.split(":")[0]
        self.moved: list[str] = []

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.device.type == "cpu" and out.numel() > 1 and _number(out):
            here = [t for t in args if isinstance(t, torch.Tensor) and t.device.type == self._type]
            self.moved += [f"{t.dtype} {list(t.shape)}" for t in here[:1]]
        return out


def _number(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.dtype == torch.uint8
