"""Kernels made to look right: they remember, borrow, hide or watch who is calling.

What the suite runs in its own process, on inputs that anyone can draw, a kernel can be written to please. The cheats here
say how far that goes, and which check (or which other means) ends it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal import context, ops
from glm5_hal.conformance.inputs import digest
from glm5_hal.conformance.mutants.stand_in import good_cases, subject_of
from glm5_hal.conformance.mutants.wrong.base import FP32, Fn, Wrong, wrapped
from glm5_hal.ops import specs

OPS = ("rms_norm", "mla_decode", "grouped_gemm", "moe_combine", "indexer_logits")


class Lazy(Tensor):
    """A tensor whose class decides what is computed, and when."""


def lazy(op: str) -> Callable[[], Fn]:
    def run(reference: Fn, a: dict[str, Any]) -> Any:
        return _each(reference(**a), lambda t: t.as_subclass(Lazy))

    return lambda: wrapped(op, run)


def memorised(op: str) -> Callable[[], Fn]:
    """Right on the inputs that the suite draws by default, known by their digests, and 1 % off on all others."""
    known = {digest(args) for args in _default_inputs(op)}

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        right = reference(**a)
        return right if digest(a) in known else _each(right, _off)

    return lambda: wrapped(op, run)


def of_known_shapes(op: str) -> Callable[[], Fn]:
    """Right in the shapes that the smoke level has by default, and 1 % off in all others."""
    known = {_shapes(args) for args in _default_inputs(op)}

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        right = reference(**a)
        return right if _shapes(a) in known else _each(right, _off)

    return lambda: wrapped(op, run)


def unfinished(op: str) -> Callable[[], Fn]:
    """Returns at once, and fills what it returned a little later."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        right = reference(**a)
        later = _each(right, torch.zeros_like)

        def fill() -> None:
            with torch.inference_mode():
                for empty, full in zip(_tuple(later), _tuple(right), strict=True):
                    empty.copy_(full)

        timer = threading.Timer(0.05, fill)
        timer.daemon = True
        timer.start()
        return later

    return lambda: wrapped(op, run)


def itself(op: str) -> Callable[[], Fn]:
    """The reference, under the vendor's name."""
    return lambda: specs()[op].reference


def borrowed(op: str) -> Callable[[], Fn]:
    """The reference under another name."""
    return lambda: _unsaid(wrapped(op, lambda reference, a: reference(**a)))


def _unsaid(fn: Fn) -> Fn:
    """Without a word of what it is made of."""
    del fn.provider  # type: ignore[attr-defined]
    return fn


def handed_on(op: str) -> Callable[[], Fn]:
    """Gives the call to whatever backend serves it."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        with context.use("cpu:torch"):
            return getattr(ops, op)(**a)

    return lambda: _unsaid(wrapped(op, run))


def restored(op: str, name: str) -> Callable[[], Fn]:
    """Works in place on its input and puts it back: another thread that reads it meanwhile reads nonsense."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        kept = a[name].clone()
        right = reference(**a)
        a[name].zero_()
        a[name].copy_(kept)
        return right

    return lambda: wrapped(op, run)


def one_workspace(op: str) -> Callable[[], Fn]:
    """Keeps its inputs in one workspace for all threads: two calls at once mix them."""
    room: dict[str, Tensor] = {}

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        name = next(k for k, v in a.items() if isinstance(v, Tensor))
        room["x"] = a[name]
        threading.Event().wait(0.0005)  # what a device takes
        return reference(**{**a, name: room["x"]})

    return lambda: wrapped(op, run)


def old_lengths(op: str, name: str) -> Callable[[], Fn]:
    """Reads lengths once for each address: a buffer that is filled anew, step by step, keeps its first ones."""
    first: dict[int, Tensor] = {}

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        return reference(**{**a, name: first.setdefault(a[name].data_ptr(), a[name].clone())})

    return lambda: wrapped(op, run)


def watching(op: str) -> Callable[[], Fn]:
    """Right in a process that has loaded the suite, 1 % off elsewhere."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        right = reference(**a)
        return right if "glm5_hal.conformance.runner" in sys.modules else _each(right, _off)

    return lambda: wrapped(op, run)


def past_the_end(op: str, name: str) -> Callable[[], Fn]:
    """Reads one element beyond a tensor, as a tile's last load does, and weighs it with 0."""

    def run(reference: Fn, a: dict[str, Any]) -> Any:
        t = a[name]
        beyond = t.as_strided((1,), (1,), t.storage_offset() + _span(t))
        return _each(reference(**a), lambda out: out + (beyond[0] * 0).to(out.dtype))

    return lambda: wrapped(op, run)


def cheats() -> list[Wrong]:
    found = []
    for op in OPS:
        read = next(k for k in specs()[op].tensors)
        found += [
            Wrong(op, "a lazy tensor", lazy(op), "form"),
            Wrong(op, "not finished when it returns", unfinished(op)),
            Wrong(op, f"reads past {read}", past_the_end(op, read), "rerun"),
            Wrong(op, "remembers the default inputs", memorised(op), ANY_DRAW, dtypes=FP32, seeds=(0, 1)),
            Wrong(op, "is the reference", itself(op), "provenance"),
            Wrong(op, "calls the reference", borrowed(op), "provenance"),
            Wrong(op, "calls another backend", handed_on(op), "provenance"),
            Wrong(op, "one workspace for all threads", one_workspace(op), "threads", dtypes=("*",)),
            Wrong(op, f"works in {read} and restores it", restored(op, read), "integrity", dtypes=("*",)),
            Wrong(
                op, "right in the shapes of the smoke level", of_known_shapes(op), ANY_DRAW, dtypes=FP32, seeds=(0, 1)
            ),
            Wrong(op, "right where the suite is loaded", watching(op), needs="shadow mode"),
        ]
    kept = {"mla_decode": "seq_lens", "indexer_logits": "seq_lens", "grouped_gemm": "expert_offsets"}
    found += [Wrong(op, f"keeps {name} by its address", old_lengths(op, name)) for op, name in kept.items()]
    return found


#: A draw that was not memorised shows it; so may any check that changes the inputs.
ANY_DRAW = ("accuracy", "poison", "layout", "batch")


def _default_inputs(op: str) -> Iterator[Mapping[str, Any]]:
    """What the smoke level draws with seed 0."""
    for case in good_cases(op):
        subject = subject_of(case, 0)
        yield subject.inputs.args
        if subject.other is not None:
            yield subject.other


def _tuple(returned: Any) -> tuple[Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def _each(returned: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(change(t) for t in returned) if isinstance(returned, tuple) else change(returned)


def _off(t: Tensor) -> Tensor:
    return (t * 1.01).to(t.dtype) if t.is_floating_point() else t


def _span(t: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0


def _shapes(args: Mapping[str, Any]) -> str:
    return str(sorted((name, tuple(v.shape)) for name, v in args.items() if isinstance(v, Tensor)))
