"""How the emulator refuses what the vendor's documents do not allow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

#: The folder of the vendor's op-plugin repository that holds one page for each op.
PAGES = "op-plugin docs/zh/custom_APIs/torch_npu"


class ConstraintError(RuntimeError):
    """A documented constraint is broken; a kernel may crash, refuse or answer wrongly here."""

    def __init__(self, op: str, constraint: str, value: object, document: str) -> None:
        super().__init__(f"{op}: {constraint}; given {shown(value)}; see {document}")
        self.op, self.constraint, self.value, self.document = op, constraint, value, document


class NotEmulatedError(NotImplementedError):
    """The documents allow this, and the emulator does not compute it."""


def shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value)


@dataclass(frozen=True)
class Rules:
    """The constraints of one op; every method returns where they hold and raises where they do not."""

    op: str
    page: str

    def need(self, held: bool | torch.Tensor, constraint: str, value: object) -> None:
        if not held:
            raise ConstraintError(self.op, constraint, value, f"{PAGES}/{self.page}")

    def one_of(self, name: str, value: Any, allowed: Iterable[Any]) -> None:
        allowed = list(allowed)
        self.need(value in allowed, f"{name} is one of {allowed}", value)

    def dtype(self, name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
        self.need(tensor.dtype in allowed, f"{name} has dtype {' or '.join(map(str, allowed))}", tensor)

    def same_dtype(self, **tensors: torch.Tensor | None) -> None:
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        dtypes = {tensor.dtype for tensor in given.values()}
        self.need(len(dtypes) <= 1, f"{', '.join(given)} have one dtype", list(given.values()))

    def dims(self, name: str, tensor: torch.Tensor, least: int, most: int | None = None) -> None:
        most = least if most is None else most
        span = str(least) if least == most else f"{least} to {most}"
        self.need(least <= tensor.dim() <= most, f"{name} has {span} dims", tensor)

    def shape(self, name: str, tensor: torch.Tensor, *sizes: int) -> None:
        self.need(tuple(tensor.shape) == sizes, f"{name} has shape {list(sizes)}", tensor)

    def contiguous(self, **tensors: torch.Tensor | None) -> None:
        for name, tensor in tensors.items():
            self.need(tensor is None or tensor.is_contiguous(), f"{name} is contiguous", tensor)

    def not_empty(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self.need(tensor.numel() > 0, f"{name} is not empty", tensor)

    def absent(self, why: str, **values: object) -> None:
        """The documents allow only None here."""
        for name, value in values.items():
            self.need(value is None, f"{name} is None ({why})", value)

    def given(self, why: str, **values: object) -> None:
        for name, value in values.items():
            self.need(value is not None, f"{name} is given ({why})", value)

    def beyond(self, asked: bool, what: str) -> None:
        """Part of the op that the documents allow and the emulator leaves out."""
        if asked:
            raise NotEmulatedError(f"{self.op}: {what} is not emulated")


def poison(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """What an output holds that the documents leave undefined: nobody shall be right by luck."""
    lowest = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, lowest, dtype=dtype)
