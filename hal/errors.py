"""The one exception of the library: what was wrong, which value, what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: Every code that a HalError may carry. A test demands that each is raised somewhere and that nothing else is.
CODES: dict[str, str] = {
    "TYPE": "an argument is not a tensor, or a scalar has the wrong Python type",
    "DTYPE": "a tensor's dtype is outside what the op declares",
    "SHAPE": "a tensor's shape disagrees with the op's declaration or with another argument",
    "STRIDE": "a tensor's memory layout is one that the op refuses",
    "DEVICE": "the tensors are not all on one device, or not on the device of the named backend",
    "SCALAR": "a scalar argument is outside its range or not among its choices",
    "VALUE": "an index or a length in a tensor is out of range",
    "GRAD": "a gradient was asked of an op that has none",
    "NO_KERNEL": "no kernel takes this call under the policy in force; the trace says why, candidate by candidate",
    "KERNEL": "a kernel raised; nothing else was tried, because its outputs may be half written",
    "POLICY": "GLM5_BACKEND (or the text given to hal.use) is not well formed",
    "UNKNOWN": "a name that does not exist: a backend, provider, op, attribute, format or GLM5_ variable",
    "PLUGIN": "a backend plugin is broken or refused",
    "CONTRACT": "a backend or an op declares something that contradicts itself or its spec",
    "CAPTURE": "the policy was changed while a device graph was being captured",
    "CONFIG": "a configuration file or option is not usable",
    "UNAVAILABLE": "a backend's device or software is not there",
}


class HalError(Exception):
    """An error with a code, the offending value and the next step.

    Attributes:
        code: one of :data:`CODES`.
        what: what was wrong, in one sentence.
        value: the offending value, as it was given.
        fix: what to do next.
        trace: the candidates that were considered, each with its reason (for ``NO_KERNEL`` and ``KERNEL``).
    """

    def __init__(self, code: str, what: str, *, value: object = None, fix: str = "", trace: Iterable[Any] = ()) -> None:
        if code not in CODES:
            raise ValueError(f"unknown HalError code {code!r}; known: {', '.join(CODES)}")
        super().__init__(what)
        self.code, self.what, self.value, self.fix, self.trace = code, what, value, fix, tuple(trace)

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.what}"]
        lines += [f"    {step}" for step in self.trace]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __repr__(self) -> str:  # all that is shown where another library wraps it, as torch.compile does
        return f"HalError({self.code!r}, {self.what!r}, fix={self.fix!r})"

    def __reduce__(self) -> tuple[Any, ...]:  # so that it crosses process boundaries whole
        return (_rebuild, (type(self), self.code, self.what, self.value, self.fix, self.trace))


def _rebuild(cls: type[HalError], code: str, what: str, value: object, fix: str, trace: tuple[Any, ...]) -> HalError:
    return cls(code, what, value=value, fix=fix, trace=trace)


def shown(value: object, limit: int = 80) -> str:
    """A value in a message, whatever its own repr does."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - of someone else's object, or of an integer with too many digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def suggest(name: str, known: Iterable[str]) -> str:
    """A `fix` sentence for an unknown name: the nearest known one, and the list."""
    import difflib

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    listing = f"known: {', '.join(names)}" if names else "none are known"
    return f"did you mean {near[0]!r}? {listing}" if near else listing
