"""Rotary tables as a model's own configuration demands, with the angles in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_hal.errors import HalError
from glm5_hal.rope import rope_tables

#: Their frequencies follow from the configuration alone. The others change with the length of the sequence.
KINDS = ("default", "linear", "yarn", "llama3")


def check(rotary: Any) -> None:
    if rotary.rope_type not in KINDS:
        raise HalError(
            "CONFIG",
            f"rope_type {rotary.rope_type!r}: its frequencies change with the length of the sequence",
            value=rotary.rope_type,
            fix=f"supported are {', '.join(KINDS)}",
        )


def tables(rotary: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``cos`` and ``sin`` of ``positions [T]``, [T, R/2] in ``dtype``, for a transformers rotary embedding.

    Scaled variants keep the frequencies and the attention factor that transformers computed for them.
    """
    if rotary.rope_type == "default":
        dim, theta = 2 * rotary.inv_freq.numel(), rotary.config.rope_parameters["rope_theta"]
        return rope_tables(positions, dim, theta, dtype=dtype)
    angles = positions.double()[:, None] * rotary.inv_freq.double()
    cos, sin = (turn(angles) * rotary.attention_scaling for turn in (torch.cos, torch.sin))
    return cos.to(dtype), sin.to(dtype)
