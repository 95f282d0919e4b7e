"""Bad inputs that follow from an op's declaration by themselves, and those that its spec adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from glm5_hal.spec import Arg, BadInput, OpSpec
from glm5_hal.torchlib import differentiable

Spoil = Callable[[dict[str, Any]], dict[str, Any]]


def bad_inputs(spec: OpSpec) -> Iterator[BadInput]:
    """Every tensor argument with a wrong dtype, rank, size, type, device or refused strides; what is written in the
    memory of another one; a gradient that is asked for; then the spec's own."""
    seen: set[str] = set()
    for arg in spec.args:
        if arg.optional:
            continue
        yield BadInput(f"{arg.name}-not_a_tensor", "TYPE", _replace(arg.name, lambda t: t.tolist()))
        yield BadInput(f"{arg.name}-dtype", "DTYPE", _replace(arg.name, lambda t: t.to(torch.complex64)))
        if "..." not in arg.dims:
            yield BadInput(f"{arg.name}-rank", "SHAPE", _replace(arg.name, lambda t: t[None]))
        yield from _wrong_sizes(arg, seen)
        if arg is not spec.args[0]:
            yield BadInput(f"{arg.name}-device", "DEVICE", _replace(arg.name, lambda t: t.to("meta")))
        if arg.layout == "page":
            yield BadInput(f"{arg.name}-strides", "STRIDE", _replace(arg.name, _strided))
    for name in spec.mutates[:1]:
        yield BadInput(f"{name}-overlaps", "STRIDE", _overlapping(name, spec))
    for arg in [a for a in spec.args if not a.optional and differentiable(spec, a)][:1]:
        yield BadInput(f"{arg.name}-gradient", "GRAD", _replace(arg.name, lambda t: t.clone().requires_grad_()))
    yield from spec.errors


def _overlapping(written: str, spec: OpSpec) -> Spoil:
    """The first argument as a view of what is written."""
    read = spec.args[0].name

    def spoil(args: dict[str, Any]) -> dict[str, Any]:
        cache, given = args[written], args[read]
        room = given.new_empty(max(given.numel(), cache.numel() * cache.itemsize // given.itemsize))
        whole = room.view(cache.dtype)[: cache.numel()].view(cache.shape).copy_(cache)
        return {**args, written: whole, read: room[: given.numel()].view(given.shape)}

    return spoil


def _wrong_sizes(arg: Arg, seen: set[str]) -> Iterator[BadInput]:
    """Each dim that an earlier argument has already fixed, one too large."""
    dims = arg.dims.split()
    for position, dim in enumerate(dims):
        if dim == "...":
            continue
        if not dim.isidentifier() or dim in seen:
            at = position if "..." not in dims[:position] else position - len(dims)
            yield BadInput(f"{arg.name}-size-{dim}", "SHAPE", _replace(arg.name, _grow(at)))
        seen.update({dim} if dim.isidentifier() else ())


def _grow(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim)


def _strided(t: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after every row."""
    wide = torch.cat([t, t], -1)
    return wide[..., : t.shape[-1]]


def _replace(name: str, change: Callable[[torch.Tensor], Any]) -> Spoil:
    return lambda args: {**args, name: change(args[name])}
