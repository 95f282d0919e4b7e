"""Memory whose ends nobody may cross: what a kernel reads or writes beyond a tensor's last element ends its process,
whether or not it uses what it read."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.trial import Trial

PAGE = mmap.PAGESIZE
NOT_AT_ALL = 0  # PROT_NONE, which mmap does not name

_libc = ctypes.CDLL(None, use_errno=True)


def fenced(x: Tensor) -> Tensor:
    """A copy in the same strides that ends where a page begins that cannot be touched; before it are 0xFF bytes, and
    before those another such page."""
    if x.numel() == 0:
        return x
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    room = -(-span * x.itemsize // PAGE) * PAGE
    pages = mmap.mmap(-1, PAGE + room + PAGE)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(0xFF)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for page in (start, start + PAGE + room):
        if _libc.mprotect(ctypes.c_void_p(page), PAGE, NOT_AT_ALL):
            raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(pages, dtype=x.dtype, count=span, offset=PAGE + room - span * x.itemsize)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


class Fenced(Trial):
    """Every argument of the kernel between fences."""

    def place(self, args: Mapping[str, Any]) -> dict[str, Any]:
        return {name: fenced(value) if isinstance(value, Tensor) else value for name, value in args.items()}
