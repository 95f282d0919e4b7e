"""The plan of a step: what its calls share, layer after layer. Without it a device is synced at every layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from glm5_hal.errors import HalError
from glm5_hal.memory import version

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What a step's calls share, layer after layer: lengths on the device and on the host, maxima, vendor schedules.

    Built once per step and activated with :meth:`active`; kernels then ask :func:`host_list` for lengths without a
    device sync, and :func:`schedule` for what they computed for an earlier layer of the same step. Results do not
    depend on a plan while it is true: host lists that are given are believed, and a write to the lengths after
    :meth:`build` is noticed only on tensors that were made outside of ``torch.inference_mode()``.

    Attributes:
        seq_lens: cached keys per request, new tokens included, [B] int32.
        cu_seqlens_q: offsets of each request's new tokens, [B+1] int32.
        host: host copies of both by name; what :meth:`build` was not given it read from the device.
        max_seq_len, max_q_len: maxima over the batch.
    """

    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    host: Mapping[str, tuple[int, ...]]
    max_seq_len: int
    max_q_len: int
    _versions: Mapping[str, int] = field(repr=False)
    _schedules: dict[Any, Any] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @staticmethod
    def build(
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        *,
        host_seq_lens: Sequence[int] | None = None,
        host_cu_seqlens_q: Sequence[int] | None = None,
    ) -> StepPlan:
        """Make the plan of one step. Give the host lists if you have them: they save the two device reads."""
        host = {
            "seq_lens": tuple(seq_lens.tolist() if host_seq_lens is None else host_seq_lens),
            "cu_seqlens_q": tuple(cu_seqlens_q.tolist() if host_cu_seqlens_q is None else host_cu_seqlens_q),
        }
        lens, offsets = host["seq_lens"], host["cu_seqlens_q"]
        if len(lens) != seq_lens.numel() or len(offsets) != cu_seqlens_q.numel() or len(offsets) != len(lens) + 1:
            raise HalError(
                "SHAPE",
                f"StepPlan: {len(lens)} seq_lens and {len(offsets)} cu_seqlens_q; the tensors hold "
                f"{seq_lens.numel()} and {cu_seqlens_q.numel()}",
                value=(len(lens), len(offsets)),
                fix="pass [B] lengths and [B+1] offsets, host lists of the same length",
            )
        queries = [b - a for a, b in pairwise(offsets)]
        if offsets[0] != 0 or min(queries, default=0) < 0 or min(lens, default=0) < 0:
            raise HalError(
                "VALUE",
                "StepPlan: cu_seqlens_q must start at 0 and not fall, and seq_lens must not be negative",
                value=host,
                fix="build the offsets with torch.cumsum over the query lengths",
            )
        versions = {"seq_lens": version(seq_lens), "cu_seqlens_q": version(cu_seqlens_q)}
        return StepPlan(seq_lens, cu_seqlens_q, host, max(lens, default=0), max(queries, default=0), versions)

    @contextmanager
    def active(self) -> Iterator[StepPlan]:
        """Let kernels called in this block (in this thread or task) see the plan."""
        token = _plan.set(self)
        try:
            yield self
        finally:
            _plan.reset(token)

    def host_of(self, tensor: torch.Tensor) -> tuple[int, ...] | None:
        """A small integer tensor's values, where the plan has them: a kernel that can do without asks here."""
        for name, values in self.host.items():
            own: torch.Tensor = getattr(self, name)
            if (own is tensor or _view(own) == _view(tensor)) and self._holds(name):
                return values
        return None

    def _holds(self, *names: str) -> bool:
        """A buffer that was written after the plan was built no longer holds the plan's values."""
        return all(version(getattr(self, name)) == self._versions[name] for name in names)


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors agree in if they are the same elements of the same memory."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


_plan: ContextVar[StepPlan | None] = ContextVar("glm5_hal_plan", default=None)


def current_plan() -> StepPlan | None:
    """The step's plan, if the caller made one."""
    return _plan.get()


def host_list(tensor: torch.Tensor) -> tuple[int, ...]:
    """A small integer tensor's values on the host: from the step's plan if it has them, else read (which syncs)."""
    plan = _plan.get()
    known = plan.host_of(tensor) if plan is not None else None
    return tuple(tensor.tolist()) if known is None else known


def schedule(key: Any, build: Any) -> Any:
    """A kernel's per-step work (a vendor's tile schedule): built at the step's first call, reused by other layers."""
    plan = _plan.get()
    if plan is None or not plan._holds(*plan.host):
        return build()
    with plan._lock:
        if key not in plan._schedules:
            plan._schedules[key] = build()
        return plan._schedules[key]
