"""npu_format_cast and get_npu_format: values stay, and the emulator remembers the format.

As on the device, the format belongs to the storage: a view has it too, and a copy is ND again (assumed: the documents
do not say what `clone` keeps). A tensor that no cast has touched counts as ND.
"""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .chip import CHIP
from .constraints import Rules

ND, FRACTAL_NZ = 2, 29
NAMES = {ND: "ND", FRACTAL_NZ: "FRACTAL_NZ"}
#: Formats that the page names. Casts to the others are for convolutions.
KNOWN = (-1, 0, 1, 2, 3, 4, 12, 16, 27, 29, 30, 32, 33, 35, 47)

_formats: dict[int, tuple[StorageWeakRef, int]] = {}  # a weak reference keeps the storage's address from being reused


def format_of(tensor: Tensor) -> int:
    _, acl_format = _formats.get(tensor.untyped_storage()._cdata, (None, ND))
    return acl_format


def need_format(rules: Rules, name: str, tensor: Tensor, acl_format: int) -> None:
    given = format_of(tensor)
    rules.need(given == acl_format, f"{name} is in format {NAMES[acl_format]}", NAMES.get(given, given))


def format_cast(input: Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None) -> Tensor:
    rules = Rules("npu_format_cast", "（beta）torch_npu-npu_format_cast.md")
    rules.one_of("acl_format", acl_format, KNOWN)
    rules.beyond(acl_format not in NAMES, f"format {acl_format}")
    rules.need(customize_dtype is None or not CHIP.is_950, "customize_dtype is for A2 and A3", customize_dtype)
    if acl_format == FRACTAL_NZ:
        rules.need(input.dim() >= 2, "a tensor in FRACTAL_NZ has at least 2 dims", input)
        if CHIP.is_950 and input.element_size() == 2:
            rules.need(input.shape[-2] != 1, "k of [k, n] is not 1 on Ascend950", input)
    return _remember(input.clone().contiguous(), acl_format)


def format_cast_like(input: Tensor, dst: Tensor, customize_dtype: int | None, input_dtype: int | None) -> Tensor:
    return format_cast(input, format_of(dst), customize_dtype, input_dtype)


def _remember(tensor: Tensor, acl_format: int) -> Tensor:
    for key in [key for key, (reference, _) in _formats.items() if reference.expired()]:
        del _formats[key]
    storage = tensor.untyped_storage()
    _formats[storage._cdata] = (StorageWeakRef(storage), acl_format)
    return tensor


def get_npu_format(input: Tensor) -> int:
    return format_of(input)


KERNELS = {
    "npu_format_cast": format_cast,
    "npu_format_cast.Tensor": format_cast_like,
    "get_npu_format": get_npu_format,
}
