"""What serving needs beside calls: cache formats, prepared weights, and the plan of a step.

Without these a backend is correct and too slow to serve with: a cache converted per call, a weight repacked per call,
a device sync per layer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_hal.errors import HalError, suggest

if TYPE_CHECKING:
    import torch


# --- cache formats ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheFormat:
    """The bytes of a paged cache. Ops take the format's tensors, ``[num_blocks, page_size, width]`` each.

    Attributes:
        name: fixed bytes: two backends that use one name can exchange caches.
        kind: "latent" (MLA's kv_lora_rank latent and its rope key) or "index" (the indexer's key).
        dtype: storage dtype; None is the activations' own.
        tensors: the op arguments that hold it.
        fields: order of "latent" (or the index key), "scale" and "rope" within a row.
        layout: in words, offsets in bytes.
        block_major: fields are laid out page by page, not token by token.
        group: elements that share one e4m3 quantisation scale; 0 where nothing is quantised.
        floor: where the scale's lower bound of 1e-4 applies, on the "scale" or on "amax". Scales are powers of two.
    """

    name: str
    kind: str
    dtype: str | None
    tensors: tuple[str, ...]
    fields: tuple[str, ...]
    layout: str
    block_major: bool = False
    group: int = 0
    floor: str = ""

    def widths(self, *dims: int) -> tuple[int, ...]:
        """Last dims of the format's tensors. ``dims``: (kv_lora_rank, rope_dim) or (index_head_dim,)."""
        expected = ("kv_lora_rank", "rope_dim") if self.kind == "latent" else ("index_head_dim",)
        if len(dims) != len(expected):
            raise HalError(
                "SHAPE",
                f"cache format {self.name} takes the dims ({', '.join(expected)}), got {dims}",
                value=dims,
                fix=f"pass {len(expected)} of them",
            )
        if self.group and dims[0] % self.group:
            raise HalError(
                "SHAPE",
                f"cache format {self.name} quantises groups of {self.group}; {dims[0]} is not a multiple of it",
                value=dims[0],
                fix="use an unquantised format for this width",
            )
        scales = 4 * (dims[0] // self.group) if self.group else 0
        if self.kind == "index":
            return (dims[0] + scales,)
        if len(self.tensors) == 2:
            return (dims[0], dims[1])
        return (dims[0] + dims[1],) if not self.group else (dims[0] + scales + 2 * dims[1],)

    def bytes_per_token(self, *dims: int, itemsize: int = 2) -> int:
        return sum(self.widths(*dims)) * (1 if self.dtype == "uint8" else itemsize)

    def allocate(
        self, num_blocks: int, page_size: int, *dims: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, ...]:
        """Zeroed tensors of the format, ``[num_blocks, page_size, width]``, for activations of ``dtype``."""
        import torch

        storage = dtype if self.dtype is None else getattr(torch, self.dtype)
        return tuple(
            torch.zeros(num_blocks, page_size, width, dtype=storage, device=device) for width in self.widths(*dims)
        )


def _load_formats() -> dict[str, CacheFormat]:
    rows = json.loads(Path(__file__).with_name("formats.json").read_text(encoding="utf-8"))
    made = (CacheFormat(**{**row, "tensors": tuple(row["tensors"]), "fields": tuple(row["fields"])}) for row in rows)
    return {f.name: f for f in made}


#: The named formats, from ``formats.json``.
FORMATS: dict[str, CacheFormat] = _load_formats()


def formats(kind: str) -> tuple[str, ...]:
    """Names of the formats of one kind ("latent", "index")."""
    return tuple(name for name, f in FORMATS.items() if f.kind == kind)


def cache_format(name: str) -> CacheFormat:
    """A named format. Raises HalError("UNKNOWN") with the nearest name."""
    if name not in FORMATS:
        raise HalError("UNKNOWN", f"no cache format {name!r}", value=name, fix=suggest(name, FORMATS))
    return FORMATS[name]


def preferred_formats(backend: str, kind: str) -> tuple[CacheFormat, ...]:
    """The formats of one kind that a backend serves, its favourite first."""
    from glm5_hal import context

    record = context.catalogue().record(backend)
    if record.backend is None:
        raise HalError("PLUGIN", f"backend {backend}: {record.reason}", value=backend, fix=record.fix)
    return tuple(cache_format(name) for name in record.backend.cache_formats.get(kind, ()))


# --- prepared weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Weights in the form that a backend likes best, made once at load time.

    Every tensor keeps the shape and dtype of the plain weight (a vendor's storage format, padding or strides may lie
    beneath), so one schema serves all; ``format`` goes into the op's ``weight_format`` argument, and a kernel that
    does not declare that format refuses the call.
    """

    op: str
    tensors: Mapping[str, torch.Tensor]
    format: str = "plain"

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def prepare(op: str, weights: Mapping[str, torch.Tensor], *, backend: str) -> Prepared:
    """Let a backend prepare an op's weights. Without a form of its own it gets them contiguous, format "plain".

    Args:
        op: the op that will use them.
        weights: plain weights by the op's argument names.
        backend: who will compute with them.

    Raises:
        HalError: UNKNOWN for an op, backend or argument that does not exist; CONTRACT if the backend changed a shape
            or dtype.
    """
    from glm5_hal import context
    from glm5_hal.ops import specs

    if op not in specs():
        raise HalError("UNKNOWN", f"no op {op!r}", value=op, fix=suggest(op, specs()))
    for name in weights:
        if name not in specs()[op].tensors:
            raise HalError(
                "UNKNOWN", f"{op} has no argument {name!r}", value=name, fix=suggest(name, specs()[op].tensors)
            )
    record = context.catalogue().record(backend)
    if record.backend is None:
        raise HalError("PLUGIN", f"backend {backend}: {record.reason}", value=backend, fix=record.fix)
    made = None if record.backend.prepare is None else record.backend.prepare(op, weights)
    if made is None:
        return Prepared(op, {name: t.contiguous() for name, t in weights.items()})
    if not isinstance(made, Prepared) or made.op != op:
        raise HalError(
            "CONTRACT",
            f"backend {backend}: preparing {op} returned {made!r}",
            value=made,
            fix=f"return None, or glm5_hal.Prepared({op!r}, ...)",
        )
    if made.format != "plain" and "weight_format" not in specs()[op].options:
        raise HalError(
            "CONTRACT",
            f"backend {backend}: preparing {op} gave format {made.format!r}, which {op} cannot be told",
            value=made.format,
            fix="only ops with a weight_format argument take prepared weights",
        )
    for name, plain in weights.items():
        if name not in made.tensors or made[name].shape != plain.shape or made[name].dtype != plain.dtype:
            raise HalError(
                "CONTRACT",
                f"backend {backend}: preparing {op} changed or dropped {name}",
                value=name,
                fix="prepared weights keep the name, shape and dtype of the plain ones",
            )
    return made


# --- step plan -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StepPlan:
    """What a step's calls share, layer after layer: lengths on the device and on the host, maxima, vendor schedules.

    Built once per step and activated with :meth:`active`; kernels then ask :func:`host_list` for lengths without a
    device sync, and :func:`schedule` for what they computed for an earlier layer of the same step. Results never
    depend on a plan, only time does.

    Attributes:
        seq_lens: cached keys per request, new tokens included, [B] int32.
        cu_seqlens_q: offsets of each request's new tokens, [B+1] int32.
        host: host copies by tensor name; what is missing is read from the device once, when first asked for.
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
        versions = {"seq_lens": _version(seq_lens), "cu_seqlens_q": _version(cu_seqlens_q)}
        return StepPlan(seq_lens, cu_seqlens_q, host, max(lens, default=0), max(queries, default=0), versions)

    @contextmanager
    def active(self) -> Iterator[StepPlan]:
        """Let kernels called in this block (in this thread or task) see the plan."""
        token = _plan.set(self)
        try:
            yield self
        finally:
            _plan.reset(token)

    def _host_of(self, tensor: torch.Tensor) -> tuple[int, ...] | None:
        for name, values in self.host.items():
            own: torch.Tensor = getattr(self, name)
            if (own is tensor or _view(own) == _view(tensor)) and self._holds(name):
                return values
        return None

    def _holds(self, *names: str) -> bool:
        """A buffer that was written after the plan was built no longer holds the plan's values."""
        return all(_version(getattr(self, name)) == self._versions[name] for name in names)


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors agree in if they are the same elements of the same memory."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _version(tensor: torch.Tensor) -> int:
    """Inference tensors have no write counter: there a plan is rebuilt by its owner, and a stale one is not seen."""
    return 0 if tensor.is_inference() else tensor._version


_plan: ContextVar[StepPlan | None] = ContextVar("glm5_hal_plan", default=None)


def current_plan() -> StepPlan | None:
    """The step's plan, if the caller made one."""
    return _plan.get()


def host_list(tensor: torch.Tensor) -> tuple[int, ...]:
    """A small integer tensor's values on the host: from the step's plan if it has them, else read (which syncs)."""
    plan = _plan.get()
    known = plan._host_of(tensor) if plan is not None else None
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


# --- rope tables -----------------------------------------------------------------------------------------------------


def rope_tables(
    positions: torch.Tensor, rotary_dim: int, theta: float, *, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cos`` and ``sin``, ``[T, rotary_dim/2]`` in ``dtype`` (None: fp32), with the angles computed in float64.

    fp32 angles are off by up to 0.01 at position 200,000, enough to change which keys the indexer selects
    (spec section 14.1). Plain RoPE; scaled variants build their own tables.
    """
    import torch

    if rotary_dim % 2 or rotary_dim <= 0 or theta <= 0:
        raise HalError(
            "SCALAR", f"rope_tables: rotary_dim={rotary_dim}, theta={theta}", fix="rotary_dim is even, theta positive"
        )
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=positions.device) / rotary_dim
    angles = positions.to(torch.float64)[:, None] * theta**-exponent
    return angles.cos().to(dtype or torch.float32), angles.sin().to(dtype or torch.float32)
