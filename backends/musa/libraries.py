"""Other people's kernels for Moore Threads' GPUs: MATE, Moore Threads' own, which has FlashMLA's and DeepGEMM's names.

Left to Triton and torch:

- MATE's dense decode: it loads pages whole and multiplies what lies behind the last key with a probability of 0, so a
  NaN that nobody wrote reaches a result; with 128 heads it is a binary of which no source says more.
- MATE's scores for the lightning indexer (``fp8_mqa_logits``, ``fp8_paged_mqa_logits``): they take queries in float8,
  and `indexer_logits` rounds nothing.
- ``moe_fused_gate``: which of equal experts it takes, and what it does with a NaN, is not said.
- vllm-musa's fused indexer (``glm52_indexer_topk_decode``, ``glm52_indexer_topk_prefill``): known by call sites alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.library import Library
from glm5_hal.backends._libraries.library import adapted as of

INSTALL = "install MATE for this MUSA: https://github.com/MooreThreads/mate"

LIBRARIES = (
    Library(
        "mate",
        ("flashmla.flash_mla_sparse_fwd", "flashmla.flash_mla_with_kvcache", "flashmla.get_mla_metadata"),
        INSTALL,
        versions=">=0.2.2",
        adapter="flash_mla",
    ),
    Library("mate", ("deep_gemm.m_grouped_bf16_gemm_nt_contiguous",), INSTALL, versions=">=0.2.2", adapter="deep_gemm"),
)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    return of(__package__, LIBRARIES)
