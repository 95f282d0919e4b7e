"""GLM-5's calls, for jobs that compile and never run: the ops' samples at the model's own widths, without values.

Every sample tagged "glm5" of level "standard" is one, in any activation dtype; a cache format that none of them has
goes with the first one. Nothing is executed: numbers are zero and each integer is the lowest that may be drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from glm5_hal.backend import Kernel
from glm5_hal.decision import Accepted
from glm5_hal.errors import HalError
from glm5_hal.formats import FORMATS, formats
from glm5_hal.metadata import signature_of
from glm5_hal.ops import specs
from glm5_hal.signature import Facts, TensorMeta
from glm5_hal.spec import Sample


@dataclass(frozen=True)
class Call:
    op: str
    sample: Sample
    dtype: str

    @property
    def id(self) -> str:
        return f"{self.op}[{self.dtype}-{self.sample.id}]"

    def arguments(self) -> dict[str, Any]:
        return dict(specs()[self.op].inputs(self.sample, self.dtype, _Nothing()).args)


def calls(op: str, dtype: str) -> Iterator[Call]:
    samples = [s for s in specs()[op].samples() if "glm5" in s.tags and s.level == "standard"]
    yield from (Call(op, sample, dtype) for sample in (*samples, *_in_other_formats(samples)))


def _in_other_formats(samples: Sequence[Sample]) -> Iterator[Sample]:
    have = [s.axes["format"] for s in samples if "format" in s.axes]
    for name in formats(FORMATS[have[0]].kind) if have else ():
        if name not in have:
            yield replace(samples[0], id=f"{samples[0].id}-{name}", axes={**samples[0].axes, "format": name})


def takes(kernel: Kernel, args: Mapping[str, Any], facts: Facts) -> bool:
    """Whether dispatch would give this call to the kernel. A dtype that the op does not know is no call."""
    spec = specs()[kernel.op]
    bound = spec.bind(**args)
    metas = {name: _meta(bound[name]) for name in spec.tensors}
    try:
        call = signature_of(spec, metas, {name: bound[name] for name in spec.options})
    except HalError as problem:
        if problem.code != "DTYPE":
            raise
        return False
    return all(isinstance(requirement.test(call, facts), Accepted) for requirement in kernel.requires)


def _meta(x: torch.Tensor | None) -> TensorMeta | None:
    if x is None:
        return None
    return TensorMeta(str(x.dtype).removeprefix("torch."), tuple(x.shape), x.device.type, tuple(x.stride()))


class _Nothing:
    """A `glm5_hal.spec.Draw` of tensors whose pages nobody has touched: a large one costs no time."""

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    def uniform(self, *shape: int, dtype: str = "float32", low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    def small(self, *shape: int, dtype: str = "float32", bound: int = 4) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.full(shape, low, dtype=torch.int64)

    def permutation(self, n: int) -> torch.Tensor:
        return torch.arange(n)
