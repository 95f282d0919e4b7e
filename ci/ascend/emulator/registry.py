"""Registers the emulator's kernels for CPU tensors of torch.ops.npu, under the vendor's own schemas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import (
    attention,
    caches,
    formats,
    grouped_matmul,
    indexer,
    mla_prolog,
    norms,
    permutation,
    quantize,
    rope,
    routing,
    sparse_attention,
    transpose_matmul,
)
from .chip import CHIP, CHIPS, lists
from .constraints import PAGES, ConstraintError

SCHEMAS = Path(__file__).resolve().parent.parent / "schemas.txt"
FAMILIES = (
    attention,
    caches,
    formats,
    grouped_matmul,
    indexer,
    mla_prolog,
    norms,
    permutation,
    quantize,
    rope,
    routing,
    sparse_attention,
    transpose_matmul,
)

_libraries: list[torch.library.Library] = []


def schemas() -> dict[str, str]:
    """The vendor's schema of every emulated op and overload, by name: `npu_grouped_matmul.List`."""
    lines = [line for line in SCHEMAS.read_text().splitlines() if line and not line.startswith("#")]
    return {line.split("(")[0].removeprefix("npu::"): line for line in lines}


def kernels() -> dict[str, Callable[..., Any]]:
    return {name: kernel for family in FAMILIES for name, kernel in family.KERNELS.items()}


def install(soc: str = "A2", *, listed_only: bool = True, hidden_positions: bool = False) -> None:
    """Give every emulated op of torch.ops.npu a kernel for CPU tensors; a second call only changes the settings.

    ``soc`` is the chip whose limits hold. ``listed_only`` refuses an op on a chip that its page does not list.
    ``hidden_positions`` is described at :class:`~.chip.Chip`.
    """
    if soc not in CHIPS:
        raise ValueError(f"soc is {soc!r}; it is one of {CHIPS}")
    CHIP.name, CHIP.listed_only, CHIP.hidden_positions = soc, listed_only, hidden_positions
    if _libraries:
        return
    library = torch.library.Library("npu", "FRAGMENT")
    _libraries.append(library)
    implementations = kernels()
    for name, schema in schemas().items():
        if not _registered(name):
            library.define(schema.removeprefix("npu::"))
        library.impl(name, _bound(name, implementations[name]), "CPU")


def uninstall() -> None:
    """Take the kernels away again, and the schemas that `install` defined."""
    while _libraries:
        _libraries.pop()._destroy()


def _registered(name: str) -> bool:
    op, _, overload = name.partition(".")
    found = torch._C._jit_get_schemas_for_operator(f"npu::{op}")
    return any(schema.overload_name == overload for schema in found)


def _bound(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, called with every argument by name: the dispatcher leaves out those that have their defaults."""
    arguments = torch._C.parse_schema(schemas()[name]).arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    op = name.partition(".")[0]

    def call(*args: Any, **kwargs: Any) -> Any:
        if CHIP.listed_only and not lists(op, CHIP.name):
            raise ConstraintError(op, f"the product table lists {CHIP.name}", CHIP.name, f"{PAGES}, page of {op}")
        return kernel(**{**defaults, **dict(zip(names, args, strict=False)), **kwargs})

    return call
