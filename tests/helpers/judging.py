"""Runs a torch kernel on its op's samples and judges it as the conformance suite would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fences import Fenced
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_hal.backend import Kernel
from glm5_hal.conformance import oracle
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import accuracy, layout, poison
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.oracle import Run
from glm5_hal.conformance.trial import Expected, Trial
from glm5_hal.decision import Accepted
from glm5_hal.formats import FORMATS
from glm5_hal.metadata import signature_of
from glm5_hal.ops import specs
from glm5_hal.signature import Facts, TensorMeta
from glm5_hal.spec import Inputs, Sample


def smoke(op: str) -> list[Sample]:
    return [s for s in specs()[op].samples() if s.level == "smoke"]


def points(*kernels: Kernel) -> pytest.MarkDecorator:
    """Every smoke sample of these kernels' ops in each of its dtypes; in float64 too, except where the fill asks for
    the bits of a narrower dtype or the cache holds e4m3, whose rows the reference reads as float32."""
    found = []
    for kernel in kernels:
        for sample in smoke(kernel.op):
            wide = sample.fill != "exact" and not FORMATS[sample.axes.get("format", "latent_576")].group
            found += [(kernel, sample, dtype) for dtype in (*sample.dtypes, *(["float64"] if wide else []))]
    return pytest.mark.parametrize(
        ("kernel", "sample", "dtype"), found, ids=[f"{k.op}-{s.id}-{d}" for k, s, d in found]
    )


def arguments(op: str, sample: Sample | str, dtype: str = "float32") -> dict[str, Any]:
    """The inputs of a sample, by itself or by its id."""
    if isinstance(sample, str):
        sample = next(s for s in smoke(op) if s.id == sample)
    return dict(_drawn(op, sample, dtype).args)


def _drawn(op: str, sample: Sample, dtype: str) -> Inputs:
    made = specs()[op].inputs(sample, dtype, Draw(0, f"{op} {sample.id}"))
    if dtype == "float64" and "weights" in made.args:  # which are float32 beside any narrower queries
        return Inputs({**made.args, "weights": made.args["weights"].double()}, made.poison)
    return made


def passes(kernel: Kernel, sample: Sample, dtype: str) -> None:
    """Within the suite's budgets, whatever the strides, and unmoved by poison in what must not be read."""
    trial = _trial(kernel, sample, dtype)
    with torch.inference_mode():
        for finding in (accuracy.judge(trial, trial.first), poison.check(trial), layout.check(trial)):
            assert finding.ok is not False, finding.detail


def takes(kernel: Kernel, sample: Sample, dtype: str) -> bool:
    """Whether dispatch would give this call to the kernel."""
    return accepts(kernel, _drawn(kernel.op, sample, dtype).args)


def accepts(kernel: Kernel, args: Mapping[str, Any], facts: Facts | None = None) -> bool:
    """The same of a call's arguments; their values are not looked at."""
    spec = specs()[kernel.op]
    bound = spec.bind(**args)
    metas = {name: _meta(bound[name]) for name in spec.tensors}
    call = signature_of(spec, metas, {name: bound[name] for name in spec.options})
    return all(isinstance(requirement.test(call, facts or Facts()), Accepted) for requirement in kernel.requires)


def _meta(x: Tensor | None) -> TensorMeta | None:
    return None if x is None else TensorMeta(str(x.dtype)[6:], tuple(x.shape), x.device.type, x.stride())


def accurate(kernel: Kernel, sample: Sample, dtype: str) -> None:
    """Within the suite's budgets, of arguments between fences."""
    trial = _trial(kernel, sample, dtype, Fenced)
    with torch.inference_mode():
        finding = accuracy.judge(trial, trial.first)
    assert finding.ok is not False, finding.detail


def _trial(kernel: Kernel, sample: Sample, dtype: str, kind: type[Trial] = Trial) -> Trial:
    spec = specs()[kernel.op]
    inputs = _drawn(kernel.op, sample, dtype)
    expected = Expected(oracle.truth(spec, inputs.args), oracle.emulation(spec, inputs.args))
    return kind(Case(spec.name, dtype, sample), inputs, kernel, kernel.fn, "cpu", expected, Facts())


def run(kernel: Kernel, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs by name, and private copies of what the op writes."""
    spec = specs()[kernel.op]
    private = oracle.copied(spec, args)
    with torch.inference_mode():
        found: Run = oracle.collect(spec, kernel.fn(**private), private)
    return {**found.outs, **found.mutated}


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8)) for k in a
    )


class NeverWaits(TorchDispatchMode):
    """Fails at the first operation for which a host would have to wait for its device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a
        )
        waits = by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select")
        assert not waits, f"{func} waits"
        return func(*args, **(kwargs or {}))
