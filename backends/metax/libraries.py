"""Other people's kernels for MetaX's GPUs.

Left to Triton and torch:

- mcoplib's top-k: ``top_k_per_row`` keeps at most 3072 scores of one of its bins, ``fast_topk`` a few thousand, and
  what is more is lost, so rows of near scores come out wrong.
- The MACA build of ``deep_gemm``: of ``bf16_mqa_logits`` and ``bf16_paged_mqa_logits`` no source says what they do with
  a NaN or behind the last key; the others take int8 or float8.
- ``mctlassEx``, ``deep_ep``: known by call sites alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.library import Library
from glm5_hal.backends._libraries.library import adapted as of
from glm5_hal.backends._libraries.vllm_ops import OPS

MCOPLIB = "install mcoplib for this MACA: https://github.com/MetaX-MACA/mcoplib"

LIBRARIES = (
    Library(
        "flash_mla",
        ("flash_mla_with_kvcache", "get_mla_metadata"),
        "install mcFlashMLA for this MACA: https://github.com/MetaX-MACA/mcFlashMLA",
        versions=">=1.0.1",
        without=("flash_mla_interface.FlashMLASchedMeta",),
    ),
    Library("mcoplib._C", (), MCOPLIB, versions=">=0.4.0", ops=OPS, adapter="mcoplib"),
    Library("mcoplib._moe_C", (), MCOPLIB, versions=">=0.4.0", ops=("_moe_C.grouped_topk",), adapter="routing"),
)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    return of(__package__, LIBRARIES)
