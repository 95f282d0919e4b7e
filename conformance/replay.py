"""A user's own tensors as a case: one call of an op in a safetensors file, judged like any other.

The file holds the tensor arguments by name; its metadata holds "op" and, as JSON, "scalars".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glm5_hal import ops
from glm5_hal.conformance import tensorfile
from glm5_hal.conformance.cases import Case
from glm5_hal.errors import HalError, suggest
from glm5_hal.ops import specs
from glm5_hal.spec import OpSpec, Sample


def save(op: str, kwargs: Mapping[str, Any], path: str | Path) -> Path:
    """Write one call to a file that ``conformance run --replay`` takes.

    Call it before the op, which may write some of its arguments. Values are kept bit by bit; strides, the device and
    what the memory around holds are not.

    Args:
        op: the op's name.
        kwargs: its arguments by name; what has a default may be left out.
        path: the file to write.

    Raises:
        HalError: UNKNOWN for an op that does not exist, TYPE for arguments that are not the op's, CONFIG where the file
            cannot be written.
    """
    spec = _spec(op)
    args = spec.bind(**kwargs)
    tensors = {name: args[name] for name in spec.tensors if isinstance(args[name], torch.Tensor)}
    scalars = {name: args[name] for name in spec.options}
    target = Path(path)
    try:
        tensorfile.write(target, tensors, {"op": op, "scalars": json.dumps(scalars)})
    except OSError as problem:
        raise HalError("CONFIG", f"cannot write {path}: {problem}", value=str(path), fix="choose another") from None
    return target


def load(path: str | Path) -> tuple[OpSpec, dict[str, Any]]:
    """The op and the arguments of a saved call, checked as the op checks a call on the CPU.

    Raises:
        HalError: CONFIG for a file that is no such call, and whatever the op says of these arguments.
    """
    tensors, metadata = tensorfile.read(Path(path))
    if "op" not in metadata:
        raise HalError(
            "CONFIG", f"{path} does not say which op it calls", value=str(path), fix='add {"op": NAME} to its metadata'
        )
    spec = _spec(metadata["op"])
    try:
        scalars = json.loads(metadata.get("scalars", "{}"))
        args = spec.bind(**{**dict.fromkeys(a.name for a in spec.args if a.optional), **tensors, **scalars})
    except (ValueError, TypeError) as problem:
        raise HalError("CONFIG", f"{path}: scalars: {problem}", value=str(path), fix="a JSON object") from None
    getattr(ops, spec.name).describe(**args)
    if spec.check_values is not None:
        spec.check_values(args)
    return spec, args


def case(path: str | Path) -> Case:
    """The case that judges a saved call. Raises what `load` raises."""
    spec, args = load(path)
    main = next(a.name for a in spec.args if not a.optional)
    dtype = str(args[main].dtype)[6:]
    return Case(spec.name, dtype, Sample(f"replay-{Path(path).stem}", {}, dtypes=(dtype,)), file=str(path))


def _spec(op: str) -> OpSpec:
    if op not in specs():
        raise HalError("UNKNOWN", f"no op {op!r}", value=op, fix=suggest(op, specs()))
    return specs()[op]
