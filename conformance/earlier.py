"""The call before the one that is judged: other numbers, and other lengths, in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.errors import HalError
from glm5_hal.spec import OpSpec


def _all_in_one(offsets: Tensor) -> Tensor:
    """The same rows, all of them the last group's."""
    return torch.cat([torch.zeros_like(offsets[:-1]), offsets[-1:]])


#: What a step's lengths may have been a step before, where the shapes were the same.
OTHERWISE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "seq_lens": lambda lengths: lengths // 2,
    "cu_seqlens_q": _all_in_one,
    "cu_seqlens_k": _all_in_one,
    "expert_offsets": _all_in_one,
}


def step(spec: OpSpec, args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with every length otherwise that may be, by the op's own check of values."""
    found = dict(args)
    for name, change in OTHERWISE.items():
        if isinstance(given := found.get(name), Tensor) and given.numel():
            changed = {**found, name: change(given)}
            if _may_be(spec, changed):
                found = changed
    return found


def _may_be(spec: OpSpec, args: Mapping[str, Any]) -> bool:
    try:
        if spec.check_values is not None:
            spec.check_values(args)
    except HalError:
        return False
    return True
