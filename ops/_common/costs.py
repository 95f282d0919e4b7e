"""The work of a call, from its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glm5_hal.metadata import bind_axes
from glm5_hal.spec import Cost, OpSpec


def cost_of(spec: OpSpec, args: Mapping[str, Any], dtype: str) -> Cost:
    """What the op's ``cost`` says. It is given, beside axes and scalars, the ``itemsize`` of the activations and
    ``cache_row``: the bytes that one key takes in the op's caches, which its format decides."""
    shapes = {n: None if args.get(n) is None else tuple(args[n].shape) for n in spec.tensors}
    axes = bind_axes(spec, shapes, {n: args[n] for n in spec.options if n in args})
    caches = [args[a.name] for a in spec.args if a.layout == "page" and args.get(a.name) is not None]
    row = sum(cache.shape[-1] * cache.itemsize for cache in caches)
    return spec.cost({**axes, "itemsize": getattr(torch, dtype).itemsize, "cache_row": row})
