"""Adapters of other people's kernels, judged by the whole suite over stand-ins for their libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import installed, stand_in

from glm5_hal.backend import Device, Kernel
from glm5_hal.catalogue import Catalogue
from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.subject import prepared
from glm5_hal.conformance.target import targets
from glm5_hal.ops import specs
from glm5_hal.plugins import PluginRecord
from glm5_hal.spec import Sample

#: A backend's kernels, as its module gives them.
Kernels = Callable[[], Sequence[Kernel]]


def put(patch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """A module that can be found and imported."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for what, value in contents.items():
        setattr(module, what, value)
    patch.setitem(sys.modules, name, module)
    return module


def emulated(kernels: Kernels, arch: str, features: Sequence[str] = ()) -> PluginRecord:
    """A backend of the adapters on CPU tensors."""
    device = Device("cpu", "a stand-in", arch, evidence="emulated", features=frozenset(features))
    return stand_in("emulated", kernels, probe=lambda: device, builtin=True)


@contextmanager
def alone(kernels: Kernels, arch: str, features: Sequence[str] = ()) -> Iterator[Catalogue]:
    with installed(emulated(kernels, arch, features)) as catalogue:
        yield catalogue


def judged(
    kernels: Kernels,
    arch: str,
    op: str,
    axes: dict[str, Any],
    *,
    dtype: str = "bfloat16",
    checks: Sequence[str] = (),
    features: Sequence[str] = (),
    **sample: Any,
) -> Result:
    """What the suite says of an adapter at one point: by all of its checks, or by these."""
    case = Case(op, dtype, Sample("adapted", axes, dtypes=(dtype,), **sample))
    asked = {name: CHECKS[name] for name in checks or CHECKS}
    with alone(kernels, arch, features):
        (target,) = targets("emulated")
        return runner.run_case(prepared(case, 0), case, target, 0, checks=asked)


def call(op: str, axes: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    return dict(specs()[op].inputs(Sample("a call", axes), dtype, Draw(0, op)).args)


def smoke(*ops: str) -> list[Any]:
    """Parameters of a test: every sample of the ops' smoke level, in two dtypes."""
    return [
        pytest.param(op, sample, dtype, id=f"{op}-{sample.id}-{dtype}")
        for op in ops
        for sample in specs()[op].samples()
        if sample.level == "smoke"
        for dtype in ("bfloat16", "float32")
        if dtype in sample.dtypes
    ]


def passes_or_is_refused(result: Result, kernel: str) -> bool:
    """Whether a kernel that takes a case does it right."""
    if result.verdict == "UNSUPPORTED":
        return bool(result.detail)
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", kernel)
    return True


def attend(q: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token over keys [n, 576]: probabilities are rounded before the product with the values; lse is natural, and
    +inf where the sum is 0 or NaN."""
    scores = q.float() @ keys.float().T * scale
    peak = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0, nan=0.0) if len(keys) else scores.new_zeros(len(q), 1)
    p = (scores - peak).exp()
    total = p.sum(-1, keepdim=True)
    nothing = (total == 0) | total.isnan()
    out = (p.to(q.dtype).float() @ keys[:, :512].float()) / total.masked_fill(nothing, 1.0)
    return out.to(q.dtype), (total.log() + peak).masked_fill(nothing, torch.inf)[:, 0]
