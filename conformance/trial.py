"""One case on one kernel: what every check is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from glm5_hal.backend import Kernel
from glm5_hal.conformance import earlier, oracle
from glm5_hal.conformance.oracle import Run
from glm5_hal.errors import HalError
from glm5_hal.metadata import bind_axes
from glm5_hal.ops._common.costs import cost_of
from glm5_hal.signature import Facts
from glm5_hal.spec import Inputs, OpSpec

if TYPE_CHECKING:
    from glm5_hal.conformance.cases import Case


@dataclass(frozen=True)
class Finding:
    """A check's answer. ``ok`` None means that the check does not apply, and ``detail`` says why."""

    ok: bool | None
    detail: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)
    mistrusted: bool = False

    @property
    def failed(self) -> bool:
        """Whether the kernel is to blame."""
        return self.ok is False and not self.mistrusted


@dataclass(frozen=True)
class Expected:
    """Oracle and emulation of a case: the same for every kernel that is judged on it."""

    truth: Run
    honest: Run


class NotTakenError(Exception):
    """A call that a kernel may refuse, and does."""


class Trial:
    """A case's inputs, its expectations, and a way to run the kernel on fresh copies."""

    def __init__(
        self,
        case: Case,
        inputs: Inputs,
        kernel: Kernel,
        call: Callable[..., Any],
        device: str,
        expected: Expected | None,
        facts: Facts,
        other: Mapping[str, Any] | None = None,
    ) -> None:
        self.case, self.inputs, self.kernel, self.device = case, inputs, kernel, device
        self.facts, self.other, self._expected = facts, other, expected
        self._call = call
        self.kernel_seconds = 0.0

    @cached_property
    def expected(self) -> Expected:
        args = self.inputs.args
        return self._expected or Expected(oracle.truth(self.spec, args), oracle.emulation(self.spec, args))

    @cached_property
    def axes(self) -> Mapping[str, Any]:
        """The op's axes and integer scalars, as this case binds them."""
        args, spec = self.inputs.args, self.spec
        shapes = {n: None if args[n] is None else tuple(args[n].shape) for n in spec.tensors}
        return bind_axes(spec, shapes, {n: args[n] for n in spec.options})

    @property
    def spec(self) -> OpSpec:
        return self.case.spec

    def run(self, args: Mapping[str, Any]) -> Run:
        """Run the kernel on the device with private copies of everything; results come back to the CPU."""
        placed = self.place(args)
        return self.bring_back(self.call(**placed), placed)

    def on(self, args: Mapping[str, Any]) -> Trial:
        """The same kernel on other inputs."""
        return Trial(self.case, Inputs(args), self.kernel, self._call, self.device, None, self.facts)

    def call(self, **placed: Any) -> Any:
        return self._call(**placed)

    def attempt(self, **placed: Any) -> Any:
        """Call with what the kernel may refuse.

        Raises:
            NotTakenError: the op, the kernel, or a part of a composite does not take such a call, and has said so
                before anything ran. What a kernel raises after that is its fault, whatever it is.
        """
        from glm5_hal import ops

        try:
            chosen = getattr(ops, self.spec.name).choose(**placed).kernel
            if self.spec.check_values is not None:
                self.spec.check_values(placed)
        except HalError as refusal:
            raise NotTakenError(refusal.what) from refusal
        if chosen.provider != self.kernel.provider:
            raise NotTakenError(f"{chosen.provider} would serve it")
        try:
            return self.call(**placed)
        except HalError as refusal:
            if refusal.code != "NO_KERNEL" or self.kernel.provider != "composite":
                raise
            said = str(refusal.trace[-1].decision) if refusal.trace else refusal.what
            raise NotTakenError(said) from refusal

    def place(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Private copies on the device, strides and alignment kept."""
        return {k: guarded(v, self.device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}

    def bring_back(self, returned: Any, placed: Mapping[str, Any]) -> Run:
        """Copies on the CPU: what a kernel does later to memory that it kept cannot change them."""
        run = oracle.collect(self.spec, returned, placed)
        return Run(*({k: v.to("cpu", copy=True) for k, v in part.items()} for part in (run.outs, run.mutated)))

    @cached_property
    def raw(self) -> tuple[dict[str, Any], Any]:
        """The run that is judged, as the kernel left it: its arguments and what it returned.

        Other numbers and lengths were in the same memory a call before: what a kernel keeps from call to call shows.
        """
        placed = self.place(self.inputs.args if self.other is None else earlier.step(self.spec, self.other))
        if self.other is not None:
            self.call(**placed)
            for name, value in placed.items():
                if isinstance(value, torch.Tensor):
                    value.copy_(self.inputs.args[name])
        wait = waiting(self.device)
        wait()
        start = time.perf_counter()
        returned = self.call(**placed)
        wait()
        self.kernel_seconds = time.perf_counter() - start
        return placed, returned

    @cached_property
    def work(self) -> dict[str, float]:
        """The call's floating-point operations and bytes, as the op declares them."""
        cost = cost_of(self.spec, self.inputs.args, self.case.dtype)
        return {"flops": float(cost.flops), "bytes": float(cost.bytes)}

    @cached_property
    def first(self) -> Run:
        """The run that is judged."""
        placed, returned = self.raw
        return self.bring_back(returned, placed)

    @cached_property
    def turned(self) -> Trial | None:
        """The trial of the other inputs, where there are some."""
        return None if self.other is None else self.on(self.other)


def waiting(device: str) -> Callable[[], None]:
    """What waits until a device has done all that it was given."""
    kind = device.split(":")[0]
    return (lambda: None) if kind == "cpu" else getattr(torch, kind).synchronize


#: How many bytes lie before and after every buffer, and what is in each of them and of a layout's gaps.
GUARD, FILL = 256, 0x4D


def guarded(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A copy in guarded memory of its own with the same strides (gaps included) and alignment."""
    pad, shift = GUARD // tensor.itemsize, tensor.storage_offset() % 16
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    length = (2 * pad + shift + span) * tensor.itemsize
    whole = torch.full((length,), FILL, dtype=torch.uint8, device=device).view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), pad + shift).copy_(tensor)


def stray(placed: torch.Tensor) -> int:
    """How many bytes around a `Trial.place`d tensor, and in its gaps, no longer hold what was put there."""
    memory = torch.empty(0, dtype=torch.uint8, device=placed.device).set_(placed.untyped_storage())
    if placed.is_contiguous():
        start = placed.storage_offset() * placed.itemsize
        around = (memory[:start], memory[start + placed.numel() * placed.itemsize :])
        return sum(int((part != FILL).sum()) for part in around)
    own = torch.zeros(len(memory) // placed.itemsize, dtype=torch.bool, device=placed.device)
    own.as_strided(placed.shape, placed.stride(), placed.storage_offset()).fill_(True)
    return int((memory.view(-1, placed.itemsize)[~own] != FILL).sum())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of bytes: NaN equals itself, 0.0 differs from −0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True
