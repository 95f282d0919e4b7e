"""safetensors files, read and written without their library: a length, a JSON header, the bytes.

Format: https://github.com/huggingface/safetensors, "Format". All tensors of a file are checked before one is made.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glm5_hal.errors import HalError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: What the format allows a header to be.
LONGEST_HEADER = 100_000_000


class _Place(NamedTuple):
    dtype: torch.dtype
    shape: list[int]
    start: int
    stop: int


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Tensors as they are in value, contiguous; strides and device are not kept. Raises HalError("DTYPE")."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts, end = [], 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise HalError("DTYPE", f"{name}: safetensors has no {tensor.dtype}", fix=f"use one of {', '.join(DTYPES)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [end, end + len(data)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Raises HalError("CONFIG") for a file that cannot be read or is not of the format."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise HalError("CONFIG", f"cannot read {path}: {problem}", value=str(path), fix="name a file") from None
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > min(LONGEST_HEADER, len(data) - 8):
            raise ValueError("the header is longer than the file")
        header = json.loads(data[8 : 8 + length])
        metadata = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
        body = memoryview(bytearray(data[8 + length :]))
        places = {name: _place(name, entry, len(body)) for name, entry in header.items()}
        return {name: _tensor(place, body) for name, place in places.items()}, metadata
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise HalError(
            "CONFIG", f"{path} is no safetensors file: {problem}", value=str(path), fix="write it with replay.save"
        ) from None


def _place(name: str, entry: Mapping[str, Any], size: int) -> _Place:
    """Where a tensor lies in a body of ``size`` bytes. Raises what `read` takes for a file of another format."""
    dtype, shape, (start, stop) = DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]], entry["data_offsets"]
    if any(n < 0 for n in shape) or not 0 <= start <= stop <= size:
        raise ValueError(f"{name} lies outside the file")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {stop - start} bytes for {entry['dtype']} {shape}")
    return _Place(dtype, shape, start, stop)


def _tensor(place: _Place, body: memoryview) -> Tensor:
    if place.start == place.stop:
        return torch.empty(place.shape, dtype=place.dtype)
    data = torch.frombuffer(body[place.start : place.stop], dtype=torch.uint8)
    return data.clone().view(place.dtype).reshape(place.shape)
