"""A call and a machine as requirements see them: metadata only, nothing that would have to be read from a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TensorMeta:
    """What may be known of a tensor without reading its values. ``dtype`` is torch's name without ``torch.``."""

    dtype: str
    shape: tuple[int, ...]
    device: str = "cpu"
    strides: tuple[int, ...] | None = None

    @property
    def contiguous(self) -> bool:
        return self.contiguous_below(0)

    def contiguous_below(self, dim: int) -> bool:
        """Whether the dims from ``dim`` on are row-major without gaps."""
        if self.strides is None or 0 in self.shape:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape[dim:]), reversed(self.strides[dim:]), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def overlapping(self) -> bool:
        """Whether two indices may name one element, as in a tensor that was expanded."""
        if self.strides is None or 0 in self.shape:
            return False
        extent = 1
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1:
                if stride < extent:
                    return True
                extent += stride * (size - 1)
        return False


@dataclass(frozen=True)
class Signature:
    """One call as the requirements see it: tensor metadata, scalar arguments, and the bound axes of the op's spec."""

    op: str
    tensors: Mapping[str, TensorMeta | None]
    scalars: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """The value of an axis or of a scalar argument; None for an axis of optional tensors that were not given."""
        return self.axes[name] if name in self.axes else self.scalars.get(name)


@dataclass(frozen=True)
class Facts:
    """What a requirement may know of the machine. Filled from the backend's probe."""

    arch: str = ""
    features: frozenset[str] = frozenset()
    versions: Mapping[str, str] = field(default_factory=dict)
