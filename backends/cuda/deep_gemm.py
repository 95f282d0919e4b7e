"""DeepGEMM's grouped product for Hopper and Blackwell as a kernel of ours, by its interface and its tests at 54e2261.

Left out are its scores for the lightning indexer (`fp8_mqa_logits`, `fp8_paged_mqa_logits`): they take queries in
float8, and `indexer_logits` rounds nothing.
"""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.deep_gemm import grouped
from glm5_hal.capability import arch, contiguous, dtype, multiple_of


@kernel(
    "grouped_gemm",
    "deep_gemm",
    requires=(
        arch("sm_90", "sm_100", "sm_103"),
        dtype("x", "bfloat16"),
        multiple_of("K", 64),
        multiple_of("N", 64),
        contiguous("weight"),
    ),
    provides=("deterministic", "graph_safe"),
)
def grouped_gemm(x: Tensor, weight: Tensor, expert_offsets: Tensor, *, weight_format: str = "plain") -> Tensor:
    library = import_module("deep_gemm")
    align: int = library.get_m_alignment_for_contiguous_layout()
    return grouped(library.m_grouped_bf16_gemm_nt_contiguous, align, x, weight, expert_offsets)
