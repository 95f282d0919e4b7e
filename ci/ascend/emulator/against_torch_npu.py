"""Holds the emulator against a real torch_npu, which needs no device for it: schemas, and outputs' shapes and dtypes.

    python -m ci.ascend.emulator.against_torch_npu

torch_npu's Meta kernels say what shapes and dtypes its ops return. The exit code is 1 where anything differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import install, schemas
from .samples import SAMPLES, sample

#: Where torch_npu's own shape inference cannot be followed, and why.
APART = {
    ("npu_mla_prolog_v3", 2): "[1] before CANN 8.5, [0] since",
    ("npu_mla_prolog_v3", 4): "[1] before CANN 8.5, [0] since",
    ("npu_mla_prolog_v3_functional", 2): "[1] before CANN 8.5, [0] since",
    ("npu_mla_prolog_v3_functional", 4): "[1] before CANN 8.5, [0] since",
}


def schema_differences() -> Iterator[str]:
    for name, schema in schemas().items():
        op, _, overload = name.partition(".")
        found = torch._C._jit_get_schemas_for_operator(f"npu::{op}")
        registered = [str(one) for one in found if one.overload_name == overload]
        if registered != [schema]:
            yield f"{name}: schemas.txt has\n  {schema}\ntorch_npu has\n  {registered}"


def shape_differences() -> Iterator[str]:
    for name, cases in SAMPLES.items():
        op, _, overload = name.partition(".")
        kernel = getattr(getattr(torch.ops.npu, op), overload or "default")
        for case in cases:
            here = _shapes(kernel(**sample(name, case)))
            there = _shapes(kernel(**on_meta(sample(name, case))))
            for at, (ours, theirs) in enumerate(zip(here, there, strict=True)):
                if ours != theirs and not ((op, at) in APART and ours[0] == (0,) and theirs[0] == (1,)):
                    yield f"{name} ({case}), output {at}: {ours} here, {theirs} there"


def on_meta(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: _mapped(value, lambda tensor: tensor.to("meta")) for name, value in arguments.items()}


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _shapes(outputs: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [(tuple(tensor.shape), tensor.dtype) for tensor in outputs]


def main() -> int:
    import torch_npu  # noqa: F401 - registers its ops

    install(listed_only=False)
    differences = [*schema_differences(), *shape_differences()]
    print("\n".join(differences) or f"{len(schemas())} schemas and {sum(map(len, SAMPLES.values()))} calls agree")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
