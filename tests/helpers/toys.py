"""Toy ops and stand-in backends: the core, seen without the real catalogue.

``published`` puts toy ops beside the real ones, ``installed`` puts stand-in backends in place of the real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import glm5_hal.backends.cpu.reference  # whoever imports `specs` must have the real ones, not the published
import glm5_hal.ops
from glm5_hal import context
from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.capability import Requirement
from glm5_hal.catalogue import Catalogue
from glm5_hal.dispatch import Op, make_op
from glm5_hal.errors import HalError
from glm5_hal.metadata import bind_axes
from glm5_hal.plugins import Checkup, PluginRecord, load, probe
from glm5_hal.signature import Signature, TensorMeta
from glm5_hal.spec import Arg, BitExact, Cost, Inputs, OpSpec, Out, Sample, Scalar
from glm5_hal.trial import tiny_kernel

FLOATS = ("float32", "bfloat16", "float16", "float64")


def spec_of(name: str, reference: Callable[..., Any], args: Sequence[Arg], **more: Any) -> OpSpec:
    """A spec with the parts that the core does not read filled in."""
    mutates = more.get("mutates", ())
    outs = more.pop("outs", () if mutates else (Out("out", "T D", "F", "the sum"),))
    tensors = [a for a in args if not a.optional]

    def inputs(sample: Sample, dtype: str, draw: Any) -> Inputs:
        kinds = {a.name: getattr(torch, dtype if a.dtype in spec.dtypes else a.dtype) for a in tensors}
        made = {a.name: torch.ones([sample.axes[d] for d in a.dims.split()], dtype=kinds[a.name]) for a in tensors}
        scalars = {n: p.default for n, p in spec.signature.parameters.items() if n in spec.options}
        return Inputs({**{a.name: None for a in args}, **made, **scalars})

    spec = OpSpec(
        name=name,
        group="toy",
        reference=reference,
        args=tuple(args),
        outs=outs,
        rounding="none",
        dtypes=more.pop("dtypes", {"F": FLOATS}),
        attributes=more.pop("attributes", ("deterministic", "graph_safe")),
        samples=lambda: [Sample("one", {"T": 2, "D": 3})],
        inputs=inputs,
        accuracy={n: BitExact() for n in [*(o.name for o in outs), *mutates]},
        cost=lambda axes: Cost(0.0, 0.0),
        source="made up",
        **more,
    )
    return spec


def _pair(x: Tensor, y: Tensor | None = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Tensor:
    """x + y + k."""
    return x + k if y is None else x + y + k


def _crowd(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    e: Tensor | None = None,
    *,
    k: int = 1,
    scale: float = 1.0,
    mode: str = "plain",
    flag: bool = False,
) -> Tensor:
    """a + b + k."""
    return a + b + k


def _write(x: Tensor, cache: Tensor) -> None:
    """cache += x."""
    cache += x


def _pipe(ops: Any, x: Tensor, *, k: int = 1) -> Tensor:
    """The toy pair, twice."""
    return ops.toy_pair(ops.toy_pair(x, k=k), k=k)  # type: ignore[no-any-return]


K = Scalar("k", "how many", low=1, high=4096)
MODE = Scalar("mode", "which way", choices=("plain", "fancy"))
FLAG = Scalar("flag", "on or off")

#: Two tensors: dispatched by its table alone.
PAIR = spec_of(
    "toy_pair",
    _pair,
    (Arg("x", "T D", "F", "one"), Arg("y", "T D", "F", "other", optional=True)),
    scalars=(K, MODE, FLAG),
)
#: Four tensors and an optional one: dispatched by its guard, then by its table.
CROWD = spec_of(
    "toy_crowd",
    _crowd,
    (
        Arg("a", "T D", "F", "first"),
        Arg("b", "T D", "F", "second"),
        Arg("c", "T D", "G", "third"),
        Arg("d", "T", "int32", "fourth"),
        Arg("e", "T D", "F", "fifth", optional=True),
    ),
    scalars=(K, Scalar("scale", "how much", low=0.0), MODE, FLAG),
    dtypes={"F": FLOATS, "G": FLOATS},
)
#: It writes one of its arguments and returns nothing.
WRITE = spec_of(
    "toy_write", _write, (Arg("x", "T D", "F", "what"), Arg("cache", "T D", "F", "where", layout="contiguous")),
    mutates=("cache",),
)  # fmt: skip
#: A composite over the toy pair.
PIPE = spec_of(
    "toy_pipe", _pipe, (Arg("x", "T D", "F", "in"),), scalars=(K,), composite=True
)  # fmt: skip

TOYS = {spec.name: spec for spec in (PAIR, CROWD, WRITE, PIPE)}


@contextmanager
def published(**more: OpSpec) -> Iterator[None]:
    """The toys among the ops."""
    module = glm5_hal.ops
    before = (module.names, module.specs)
    everything = {**before[1](), **TOYS, **more}
    module.names, module.specs = lambda: tuple(sorted(everything)), lambda: everything  # type: ignore[assignment]
    try:
        yield
    finally:
        module.names, module.specs = before
        for name in {**TOYS, **more}:
            vars(module).pop(name, None)


def toy(spec: OpSpec) -> Op:
    return make_op(spec)


def stand_in(
    name: str,
    kernels: Sequence[Kernel] | Callable[[], Sequence[Kernel]] = (),
    *,
    device_type: str = "cpu",
    builtin: bool = False,
    probe: Callable[[], Device | Unavailable] | None = None,
    arch: str = "toy1",
    **fields: Any,
) -> PluginRecord:
    """The record of a backend that is in order."""
    found = Device(device_type, f"{name} device", arch, evidence="simulated", versions={"driver": "1.2.3"})
    offer = kernels if callable(kernels) else lambda: kernels
    backend = Backend(name, device_type, probe or (lambda: found), offer, **fields)
    dist = "glm5-hal" if builtin else f"{name}-hal"
    return PluginRecord(name, f"{name}_plugin", dist, "1.0", builtin, backend=backend)


@contextmanager
def installed(*records: PluginRecord) -> Iterator[Catalogue]:
    """These backends and no others; then everything as it was."""
    context.reset()
    context._process.catalogue = Catalogue(records)
    try:
        yield context._process.catalogue
    finally:
        context.reset()


def kernel_of(
    spec: OpSpec,
    provider: str = "native",
    fn: Callable[..., Any] | None = None,
    *,
    requires: Sequence[Requirement] = (),
    provides: Sequence[str] = (),
) -> Kernel:
    """A kernel of a toy; without a function of its own it computes what the reference does."""
    return Kernel(spec.name, provider, fn or spec.reference, tuple(requires), frozenset(provides))


def call_of(
    spec: OpSpec, device: str = "cpu", dtype: str = "float32", shapes: Mapping[str, Any] | None = None, **scalars: Any
) -> Signature:
    """A call of an op with two-dimensional tensors on any device, made-up ones too."""
    metas: dict[str, TensorMeta | None] = {}
    for arg in spec.args:
        shape = (shapes or {}).get(arg.name, None if arg.optional else (2, 3)[: len(arg.dims.split())])
        kind = dtype if arg.dtype in spec.dtypes else arg.dtype
        metas[arg.name] = None if shape is None else TensorMeta(kind, tuple(shape), device)
    values = {n: p.default for n, p in spec.signature.parameters.items() if n in spec.options} | scalars
    axes = bind_axes(spec, {n: None if m is None else m.shape for n, m in metas.items()}, values)
    return Signature(spec.name, metas, values, axes)


def raised(call: Callable[..., Any], *args: Any, **kwargs: Any) -> HalError:
    """The HalError that a call raises."""
    try:
        call(*args, **kwargs)
    except HalError as problem:
        return problem
    raise AssertionError("no HalError was raised")


def first_sample(spec: OpSpec, dtype: str | None = None) -> dict[str, Any]:
    """Arguments of an op's first sample."""
    from glm5_hal.conformance.inputs import Draw

    sample = next(iter(spec.samples()))
    return dict(spec.inputs(sample, dtype or sample.dtypes[0], Draw(0, spec.name)).args)


def fresh_copy(args: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in args.items()}


def checked_here(record: PluginRecord, deadline: float, last: str) -> Checkup:
    """A checkup without a process: what a test is about is what is made of the answer."""
    record = load(record, None)
    if record.status != "ok":
        return Checkup(record)
    found = probe(record, None)
    return Checkup(record, found, tiny_kernel(record) if isinstance(found, Device) else "")
