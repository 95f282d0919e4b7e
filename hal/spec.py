"""One declaration per op. Everything else (torch op, dispatch, conformance, docs, benchmark) is derived from it.

Dims are text: ``"T H D"`` binds three axes; ``"B+1"``, ``"2*I"`` compute from bound ones; ``"..."`` stands for any
leading dims. Dtypes are torch names without ``torch.``, or a variable of ``OpSpec.dtypes``: the same variable means
the same dtype throughout one call. ``acc`` is the accumulation dtype: float32, or float64 where F is float64.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from glm5_hal.backend import ATTRIBUTES
from glm5_hal.errors import HalError, suggest

if TYPE_CHECKING:
    import torch

#: The dtypes of activations, the common case of a dtype variable.
FLOATS = ("bfloat16", "float16", "float32", "float64")

LEVELS = ("smoke", "standard", "full")


@dataclass(frozen=True)
class Arg:
    """A tensor argument. ``layout`` "page" asks that everything below the first dim is contiguous (a cache's pages:
    their bytes are the format), "contiguous" that all is; "any" leaves the strides to the kernels."""

    name: str
    dims: str
    dtype: str
    doc: str
    optional: bool = False
    layout: str = "any"


@dataclass(frozen=True)
class Scalar:
    """A scalar argument. ``choices`` or an inclusive range (``low``, ``high``) may bound it."""

    name: str
    doc: str
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Out:
    """A returned tensor. Its dims may use axes and integer scalars."""

    name: str
    dims: str
    dtype: str
    doc: str


@dataclass(frozen=True)
class Constraint:
    """A relation that dims cannot say. ``test`` gets axes and scalars in one mapping, and "dtypes" by argument."""

    text: str
    test: Callable[[Mapping[str, Any]], bool]
    fix: str
    code: str = "SHAPE"


# --- how an output is judged (the arithmetic is in conformance/compare.py and calibrated.py) -------------------------


@dataclass(frozen=True)
class Calibrated:
    """Row by row against float64, with a budget from the honest emulation and a floor for accumulation order.

    Attributes:
        depth: the axis (or axes) that is summed over; the floor grows with its square root.
        amplify: how much the rounding error of an inner product is magnified before it reaches the output, per row
            or one number; 1 where the output is that inner product itself.
        row_dims: how many trailing dims make up one row.
    """

    depth: tuple[str, ...] = ()
    amplify: Callable[[Mapping[str, Any]], Any] | None = None
    row_dims: int = 1


@dataclass(frozen=True)
class AbsoluteError:
    """For log-sum-exp: the error itself, with the same calibration and floor, and infinities in the same places."""

    depth: tuple[str, ...] = ()
    amplify: Callable[[Mapping[str, Any]], Any] | None = None


@dataclass(frozen=True)
class BitExact:
    """The same bits as the reference: packing, permuting, index arithmetic."""


@dataclass(frozen=True)
class Selection:
    """Chosen indices, judged by threshold on float64 scores; exactly where the kernel claims ``canonical_ties``.

    ``scores(args)`` returns (scores [T, S] float64 with -inf where not eligible, tau [T]: the rounding of a score).
    ``padded``: -1 fills the places for which no eligible score is left; else there is always enough to choose from.
    """

    scores: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    padded: bool = True


@dataclass(frozen=True)
class Given:
    """Judged against the oracle with the kernel's own discrete choice fed in: ``expected(args, outputs)``."""

    expected: Callable[[Mapping[str, Any], tuple[Any, ...]], Any]
    depth: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheContents:
    """A written cache, read back through its format: bit-exact bytes where only stored, calibrated where computed."""

    kind: str
    depth: tuple[str, ...] = ()


Accuracy = Calibrated | AbsoluteError | BitExact | Selection | Given | CacheContents


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One point of the input space. ``axes`` is whatever the op's ``inputs`` reads.

    ``level`` is the first level that runs it; ``fill`` is "normal" or "exact" (small integers: fp32 sums are exact,
    and bit equality is demanded); ``tags`` group samples ("glm5", "edge"); "empty" says that an output of zeros is the
    right answer, not a bad sample.
    """

    id: str
    axes: Mapping[str, Any]
    level: str = "smoke"
    fill: str = "normal"
    tags: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")

    def __post_init__(self) -> None:
        if self.level not in LEVELS or self.fill not in ("normal", "exact"):
            raise HalError(
                "CONTRACT", f"sample {self.id}: level {self.level!r}, fill {self.fill!r}", fix=f"levels: {LEVELS}"
            )


@dataclass(frozen=True)
class Inputs:
    """Arguments for one call, and which elements of them must not influence the result (True = poison me)."""

    args: Mapping[str, Any]
    poison: Mapping[str, Any] = field(default_factory=dict)


class Draw(Protocol):
    """Random numbers on an exact grid: the same bits on every host, exact in every dtype of the catalogue."""

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> torch.Tensor: ...
    def uniform(self, *shape: int, dtype: str = "float32", low: float = 0.0, high: float = 1.0) -> torch.Tensor: ...
    def small(self, *shape: int, dtype: str = "float32", bound: int = 4) -> torch.Tensor: ...
    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor: ...
    def permutation(self, n: int) -> torch.Tensor: ...


class Pick(Protocol):
    """Choices that a fuzzer makes, and takes back to find the smallest failure: small numbers and early options are
    the simplest."""

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        ...

    def of(self, options: Sequence[Any]) -> Any: ...

    def lens(self, requests: int, new: int, keys: int) -> tuple[tuple[int, int], ...]:
        """(new tokens, keys) of up to so many requests, each up to so many."""
        ...


@dataclass(frozen=True)
class BadInput:
    """Arguments that must be refused with ``code`` before anything is written. ``spoil`` edits a copy of good ones."""

    id: str
    code: str
    spoil: Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations (2 per multiply-add) and bytes that must cross memory."""

    flops: float
    bytes: float


# --- the op ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpSpec:
    """The declaration of an op.

    Attributes:
        group: the catalogue's group ("elementary", "mla", "dsa", "moe").
        reference: the executable semantics in readable torch: annotated (the torch schema is read from it), correct
            in float64, its docstring is the op's page. A composite's takes the namespace of ops as a first argument.
        rounding: which intermediates are rounded to the storage dtype. It defines the emulation and so every budget.
        dtypes: dtype variables and what they may be.
        mutates: arguments that the op writes.
        attributes: what a kernel of this op may claim (keys of `glm5_hal.backend.ATTRIBUTES`).
        samples, inputs: the points that conformance visits, and how arguments are made for one.
        accuracy: how each output, and each mutated argument, is judged.
        cost: work of a call, from its axes and scalars.
        errors: bad inputs beyond those that follow from the declaration by themselves.
        check_values: raises HalError("VALUE") for indices and lengths out of range; reads tensor values.
        emulate: an honest implementation with the loosest roundings of the contract, where that is not the
            reference in the storage dtype.
        composite: the default implementation is made of other ops.
        own_products: a composite's body also multiplies matrices in plain torch, beside the ops that it calls. It then
            takes plain weights only, and cannot promise that a row's bits are independent of the batch.
        fuzz: any point that ``inputs`` can make, small ones; None draws from ``samples``.
        source: where the maths comes from.
    """

    name: str
    group: str
    reference: Callable[..., Any]
    args: tuple[Arg, ...]
    outs: tuple[Out, ...]
    rounding: str
    dtypes: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    samples: Callable[[], Iterable[Sample]]
    inputs: Callable[[Sample, str, Draw], Inputs]
    accuracy: Mapping[str, Accuracy]
    cost: Callable[[Mapping[str, Any]], Cost]
    source: str
    scalars: tuple[Scalar, ...] = ()
    mutates: tuple[str, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    errors: tuple[BadInput, ...] = ()
    check_values: Callable[[Mapping[str, Any]], None] | None = None
    emulate: Callable[..., Any] | None = None
    composite: bool = False
    own_products: bool = False
    fuzz: Callable[[Pick], Sample] | None = None
    since: int = 1

    def __post_init__(self) -> None:
        names = list(self.signature.parameters)
        declared = [a.name for a in self.args] + [s.name for s in self.scalars]
        problems = []
        if sorted(names) != sorted(declared):
            problems.append(f"signature has {names}, args and scalars declare {declared}")
        judged, outputs = set(self.accuracy), {o.name for o in self.outs} | set(self.mutates)
        if judged != outputs:
            problems.append(f"accuracy judges {sorted(judged)}, the outputs are {sorted(outputs)}")
        if set(self.attributes) - ATTRIBUTES.keys():
            problems.append(f"unknown attributes {sorted(set(self.attributes) - ATTRIBUTES.keys())}")
        if set(self.mutates) - {a.name for a in self.args}:
            problems.append(f"mutates {self.mutates}, which are not all arguments")
        if problems:
            raise HalError("CONTRACT", f"op {self.name}: {'; '.join(problems)}", fix="mend the OpSpec")

    @cached_property
    def signature(self) -> inspect.Signature:
        """Of a call: the reference's, less a composite's leading namespace."""
        whole = inspect.signature(self.reference, eval_str=True)
        parameters = list(whole.parameters.values())
        return whole.replace(parameters=parameters[1:] if self.composite else parameters)

    @cached_property
    def tensors(self) -> Mapping[str, Arg]:
        return {a.name: a for a in self.args}

    @cached_property
    def required(self) -> frozenset[str]:
        """Names of the tensor arguments that every call has."""
        return frozenset(a.name for a in self.args if not a.optional)

    @cached_property
    def options(self) -> Mapping[str, Scalar]:
        return {s.name: s for s in self.scalars}

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.reference) or ""

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of a call by name, defaults filled in. Raises HalError("TYPE") for a malformed call."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as problem:
            raise HalError("TYPE", f"{self.name}: {problem}", fix=f"call {self.name}{self.signature}") from None
        bound.apply_defaults()
        return dict(bound.arguments)


def declared(op: str) -> OpSpec:
    """The declaration of an op. Raises HalError("UNKNOWN") with the nearest name."""
    from glm5_hal.ops import specs

    known = specs()
    if op not in known:
        raise HalError("UNKNOWN", f"no op {op!r}", value=op, fix=suggest(op, known))
    return known[op]
