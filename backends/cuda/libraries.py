"""Other people's kernels for NVIDIA's GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.library import Library
from glm5_hal.backends._libraries.library import adapted as of

LIBRARIES = (
    Library(
        "flash_mla",
        # With FlashMLASchedMeta came the natural logarithm: before, flash_mla_sparse_fwd gave an lse of base 2.
        ("flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata", "flash_mla_interface.FlashMLASchedMeta"),
        "pip install -U git+https://github.com/deepseek-ai/FlashMLA",
    ),
    Library(
        "deep_gemm",
        ("m_grouped_bf16_gemm_nt_contiguous", "get_m_alignment_for_contiguous_layout"),
        "pip install -U git+https://github.com/deepseek-ai/DeepGEMM",
    ),
)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    return of(__package__, LIBRARIES)
