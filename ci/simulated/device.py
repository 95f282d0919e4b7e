"""A device that is none: tensors called ``musa`` or ``cuda`` whose memory is the host's and whose maths is the CPU's.

It shows what a CPU hides: results stay on the device, tensors of two devices do not mix, and whatever leaves for the
host is seen. It says nothing of a real device's numbers, speed or memory. A process can have one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .memory import HOST, allocated, moved, on_host
from .watching import HiddenReadError, note, recording, site

aten = torch.ops.aten

#: Operations that only say anew what lies where.
REFRAMES = {
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
    aten.set_.default,
}

#: Operations that take an index of the host, too.
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) @ b.to(dtype)


#: Operations that torch has for accelerators only.
ACCELERATED: Mapping[Any, Callable[..., Any]] = {aten.mm.dtype: _product, aten.bmm.dtype: _product}

#: torch's table of guards, one for each type of device: c10::impl::device_guard_impl_registry.
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"


class StandIn:
    """torch's operations on one type of device. A tensor's number is kept; ``current`` is that of new ones."""

    def __init__(self, type: str, count: int) -> None:
        self.type, self.count, self.current = type, count, 0

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Any operation of torch on tensors of the device."""
        if op.is_view or op in REFRAMES:
            return op.redispatch(HOST, *args, **kwargs)
        if op is aten.resize_.default:
            return self._resized(args[0], torch.empty(args[1], dtype=args[0].dtype, device="meta"))
        index = self._index(op, args, kwargs)
        if torch.Tag.data_dependent_output in op.tags:
            note("value", op, args[0])
        elif torch.Tag.dynamic_output_shape in op.tags and (op is not aten.index.Tensor or _by_mask(args[1])):
            note("size", op, args[0])
        return self._compute(op, args, kwargs, index)

    def hosted(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function of a library that takes tensors of the device, made of one that computes on the CPU. As the
        library would, it takes no tensors of the host."""

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = _tensors((args, tuple(kwargs.values())))
            for t in given:
                if t.device.type != self.type:
                    raise RuntimeError(f"{fn.__name__} was given {t.dtype} {list(t.shape)} of {t.device}, at {site()}")
            return self._run(fn, args, kwargs, next((t.device.index or 0 for t in given), self.current))

        return call

    def empty(self, size: Sequence[int], *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        """`torch.empty`."""
        return self._made(torch.empty(size, dtype=dtype, device="meta"), device)

    def empty_strided(
        self, size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, device: Any = None, **kwargs: Any
    ) -> Tensor:
        """`torch.empty_strided`."""
        return self._made(torch.empty_strided(size, stride, dtype=dtype, device="meta"), device)

    def copy_(self, into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """`Tensor.copy_`, where one of the two is the device's."""
        if into.device.type != self.type:
            note("copy", aten.copy_.default, source)
        elif source.device.type != self.type and recording() is not None:
            raise HiddenReadError(f"a graph is being captured; {list(source.shape)} come from the host, at {site()}")
        self._compute(aten.copy_.default, (into, source), {}, 0)
        return into

    def _compute(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], index: int) -> Any:
        return self._run(ACCELERATED.get(op, op), _with_tensors(op, args), kwargs, index)

    def _run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], index: int) -> Any:
        """On the CPU, in the same memory; what is new comes into memory of the device's."""
        mine: dict[int, tuple[Tensor, Tensor]] = {}

        def seen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.device.type == self.type:
                host = on_host(value)
                mine[id(host)] = host, value
                return host
            return torch.device("cpu") if isinstance(value, torch.device) else value

        def placed(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return mine[id(value)][1] if id(value) in mine else moved(value, self.type, index)

        hosts, named = _each(seen, args), {k: _each(seen, v) for k, v in kwargs.items()}
        out = fn(*hosts, **named)
        for host, given in mine.values():
            if host.shape != given.shape:  # an empty tensor, given for a result
                on_host(self._resized(given, host)).copy_(host)
        results = _each(placed, out)
        if (steps := recording()) is not None:
            steps.append(lambda: _again(fn, hosts, named, results, mine))
        return results

    def _index(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """The device's number, of all tensors the same one. A single number may be the host's."""
        here, others, first = set(), set(), next(iter(args), None)
        for t in _tensors((args, tuple(kwargs.values()))):
            if t.device.type == self.type:
                here.add(t.device.index or 0)
            elif (t.dim() or t.device.type != "cpu") and (t is first or op._schema.name not in INDEXED):
                others.add(str(t.device))
        if here and (others or len(here) > 1):
            found = " and ".join([*sorted(f"{self.type}:{i}" for i in here), *sorted(others)])
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} ({op})")
        return here.pop() if here else self.current

    def _made(self, like: Tensor, device: Any) -> Tensor:
        index = None if device is None else torch.device(device).index
        return self._allocated(like, self.current if index is None else index)

    def _allocated(self, like: Tensor, index: int) -> Tensor:
        return allocated(like.shape, like.stride(), like.dtype, self.type, index)

    def _resized(self, tensor: Tensor, like: Tensor) -> Tensor:
        if like.numel() * like.itemsize > tensor.untyped_storage().nbytes():
            return tensor.set_(self._allocated(like, tensor.device.index or 0))
        return tensor.set_(tensor.untyped_storage(), 0, like.shape, like.stride())


def install(type: str, count: int = 2) -> StandIn:
    """Let torch have devices of this type for the rest of the process: "cuda" in a build without CUDA, or any other
    name in its one place for an outside device. `namespace.attach` gives them their torch.<type>."""
    if type == "cuda" and torch.version.cuda:
        raise RuntimeError("this build of torch has CUDA: a stand-in for it needs one without")
    made, key = StandIn(type, count), "CUDA" if type == "cuda" else "PrivateUse1"
    if type != "cuda":
        torch.utils.rename_privateuse1_backend(type)
        torch.utils.generate_methods_for_privateuse1_backend()
    _guard(torch._C._autograd.DeviceType, key)
    anything, named = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    anything.fallback(made, key)
    # These torch also asks for where it has told a dispatch mode to wait; a fallback is not found then.
    for name, fn in (("empty.memory_format", made.empty), ("empty_strided", made.empty_strided), ("copy_", made.copy_)):
        named.impl(name, fn, key)
    _registered.extend((anything, named))
    return made


#: What a Library registered goes when it does.
_registered: list[Any] = []


class _Guard(torch._C._acc.DeviceGuard):
    """What torch asks for the current device, around each operation."""

    def __init__(self, type: Any) -> None:
        super().__init__()
        self._type = type

    def type_(self) -> Any:
        return self._type


def _guard(types: Any, key: str) -> None:
    """Register a guard. torch has a function for that of outside devices only; in a build without CUDA the place of
    CUDA's is empty, and takes the same."""
    guard = _Guard(getattr(types, key))
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    _registered.append(guard)
    if key == "CUDA":
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * (int(types.PrivateUse1) + 1)).in_dll(library, GUARDS)
        guards[int(types.CUDA)] = guards[int(types.PrivateUse1)]


def _again(fn: Any, args: Any, kwargs: Any, results: Any, mine: Any) -> None:
    """Compute a recorded operation once more, into the memory of its first results. ``mine`` keeps its arguments'."""
    for old, new in zip(_tensors((results,)), _tensors((fn(*args, **kwargs),)), strict=True):
        if id(new) not in mine:
            on_host(old).copy_(new)
    for host, given in mine.values():
        if host.data_ptr() != given.data_ptr():  # it was empty, and grew
            on_host(given).copy_(host)


def _each(fn: Callable[[Any], Any], value: Any) -> Any:
    """Of the arguments or results of an operation: tensors, and lists of them."""
    return type(value)([_each(fn, v) for v in value]) if isinstance(value, (list, tuple)) else fn(value)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _by_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _with_tensors(op: Any, args: Sequence[Any]) -> Sequence[Any]:
    """torch hands a Python number over where the operation wants a tensor."""
    wanted = _wanted(op)
    return [_number(v) if i in wanted and isinstance(v, (bool, int, float)) else v for i, v in enumerate(args)]


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


@cache
def _wanted(op: Any) -> frozenset[int]:
    return frozenset(i for i, a in enumerate(op._schema.arguments) if str(a.type) == "Tensor")
