"""MATE's grouped product as a kernel of ours, by its interface, its checks and its tests at 3f58cc3: DeepGEMM's, with
blocks of 128 rows. What the product itself takes is in a binary; its tests have widths that are multiples of 1024."""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.deep_gemm import grouped
from glm5_hal.capability import arch, contiguous, dtype, multiple_of

BLOCK = 128


@kernel(
    "grouped_gemm",
    "mate",
    requires=(
        arch("mp_31"),
        dtype("x", "bfloat16"),
        multiple_of("K", 1024),
        multiple_of("N", 1024),
        contiguous("weight"),
    ),
    provides=("deterministic", "graph_safe"),
)
def grouped_gemm(x: Tensor, weight: Tensor, expert_offsets: Tensor, *, weight_format: str = "plain") -> Tensor:
    multiply = import_module("mate.deep_gemm").m_grouped_bf16_gemm_nt_contiguous
    return grouped(multiply, BLOCK, x, weight, expert_offsets)
