"""npu_dynamic_quant, and the roundings to int8 that other ops share.

A row's scale is its largest magnitude / 127 and values are rounded half to even. Assumed where the documents are
silent: a row of zeros has scale 0 and stays zeros (its golden code divides 0 by 0); values that leave int8 saturate.
The page wants group_index "monotonically rising", and the vendor's tests repeat values in it: repeats are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constraints import Rules
from .norms import HALF

INT8, QUINT4X2 = 1, 16  # torch's numbers of these dtypes


def int8(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127).to(torch.int8)


def per_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and the float32 scale of each last-dim row, as [..., 1]."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return int8(x / scale.masked_fill(scale == 0, 1.0)), scale


def unpacked(scale: Tensor) -> Tensor:
    """The float32 scale in the low half of an int64, as npu_trans_quant_param packs it."""
    return (scale & 0xFFFFFFFF).to(torch.uint32).view(torch.float32) if scale.dtype is torch.int64 else scale.float()


def dynamic_quant(
    input: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    rules = Rules("npu_dynamic_quant", "torch_npu-npu_dynamic_quant.md")
    rules.need(dst_type in (None, INT8, QUINT4X2), "dst_type is int8 or quint4x2", dst_type)
    rules.beyond(dst_type == QUINT4X2, "dst_type quint4x2")
    rules.beyond(quant_mode != "pertoken", f"quant_mode {quant_mode}")
    rules.beyond(dst_type_max != 0.0, "dst_type_max")
    rules.dtype("input", input, *HALF)
    rules.need(input.dim() > 1, "input has more than 1 dim", input)
    x = input.float()
    width = input.shape[-1]
    if group_index is not None:
        rules.given("group_index is given", smooth_scales=smooth_scales)
    if smooth_scales is not None:
        rules.dtype("smooth_scales", smooth_scales, input.dtype)
        if group_index is None:
            rules.shape("smooth_scales", smooth_scales, width)
            x = x * smooth_scales.float()
        else:
            x = _by_group(rules, x.reshape(-1, width), smooth_scales, group_index).view(x.shape)
    y, scale = per_row(x)
    return y, scale.squeeze(-1)


def _by_group(rules: Rules, x: Tensor, smooth: Tensor, ends: Tensor) -> Tensor:
    rules.dtype("group_index", ends, torch.int32)
    rules.dims("group_index", ends, 1)
    rules.shape("smooth_scales", smooth, len(ends), x.shape[1])
    counts = ends.long().diff(prepend=torch.zeros(1, dtype=torch.int64))
    rules.need(bool((counts >= 0).all()), "group_index does not fall and has nothing below 0", ends.tolist())
    rules.need(int(ends[-1]) == len(x), f"group_index ends at the number of rows, {len(x)}", ends.tolist())
    return x * smooth.float().repeat_interleave(counts, 0)


KERNELS = {"npu_dynamic_quant": dynamic_quant}
