"""Other people's kernels for MetaX's GPUs.

Known by call sites alone, and so left to Triton and torch: ``mctlassEx`` (closed), ``deep_ep``, and of the MACA build
of ``deep_gemm`` the ops whose masks and layouts no source says: ``bf16_mqa_logits``, ``bf16_paged_mqa_logits``,
``int8_mqa_logits``, ``int8_paged_mqa_logits``.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.library import Library
from glm5_hal.backends._libraries.library import adapted as of

LIBRARIES = (
    Library(
        "flash_mla",
        ("flash_mla_with_kvcache", "get_mla_metadata"),
        "install mcFlashMLA for this MACA: https://github.com/MetaX-MACA/mcFlashMLA",
        versions=">=1.0.1",
        without=("flash_mla_interface.FlashMLASchedMeta",),
    ),
)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    return of(__package__, LIBRARIES)
