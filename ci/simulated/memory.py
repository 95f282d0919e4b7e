"""Memory of the host that torch takes for a device's: handed to torch as DLPack, with another device's name on it.

So the tensors are torch's own, with strides, views, storages and addresses; only their maths must come from elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

#: DLPack's numbers for the types of device that a stand-in may have: CUDA, and the one for anything else.
KINDS = {"cuda": 2}
EXTERNAL = 12

#: The head of a block is what DLPack wants to know of the rest. Both lie on a cache line of their own.
LINE, HEAD = 64, 128

HOST = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class _Managed(ctypes.Structure):
    """DLManagedTensor, for bytes in one dimension; its two arrays follow it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("step", ctypes.c_int64),
    ]


_libc = ctypes.CDLL(None)
_libc.aligned_alloc.restype, _libc.aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_size_t]
_free = ctypes.cast(_libc.free, ctypes.c_void_p).value
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def allocated(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, type: str, index: int) -> Tensor:
    """A tensor of the device in memory of its own, which whoever holds it last frees: with C's free, so that no Python
    runs at a moment that torch chooses."""
    span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
    room = max(LINE, -(-span * dtype.itemsize // LINE) * LINE)
    block = _libc.aligned_alloc(LINE, HEAD + room)
    if not block:
        raise MemoryError(f"a stand-in's tensor of {room} bytes")
    head = _Managed.from_address(block)
    head.data, head.device_type, head.device_index = block + HEAD, KINDS.get(type, EXTERNAL), index
    head.ndim, head.code, head.bits, head.lanes, head.byte_offset, head.context = 1, 1, 8, 1, 0, None
    head.size, head.step = span * dtype.itemsize, 1
    head.shape, head.strides = block + _Managed.size.offset, block + _Managed.step.offset
    head.deleter = _free
    whole = torch._C._from_dlpack(_capsule(block, b"dltensor", None))
    return torch.ops.aten.as_strided.default.redispatch(HOST, whole.view(dtype), size, stride, 0)


def on_host(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of the CPU, for as long as the device's tensor lives. One without elements has memory
    that can grow: an operation may be given it for its result."""
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    storage = tensor.untyped_storage()
    make = torch._C._construct_storage_from_data_pointer
    host = make(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype).set_(host, tensor.storage_offset(), tensor.shape, tensor.stride())


def moved(host: Tensor, type: str, index: int) -> Tensor:
    """A copy of a tensor of the CPU on the device."""
    dense = torch.empty_like(host, device="meta").stride()
    made = allocated(host.shape, dense, host.dtype, type, index)
    on_host(made).copy_(host)
    return made
