"""Other people's kernels for Hygon's DCUs. They are closed, and known by the calls of sglang-das (9ca1b25f7) and
vllm-plugin-das.

Left to Triton and torch:

- ``flash_mla``'s decode: which of its two interfaces a build has, and what it reads behind the last key and of an fp8
  cache, no source says.
- ``lightop``: what ``mqa_logits`` and ``paged_mqa_logits`` do with a NaN is not said, and on gfx938 the index cache is
  tiled, which is no named format; ``top_k_per_row_prefill`` has the name of a kernel whose public form loses scores
  where more than 3072 fall into one of its bins; ``moe_fused_gate`` does not say what it does with a NaN.
- ``deep_gemm``, ``lmslim``, ``aiter``: no call fixes a product in bfloat16 alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.library import Library
from glm5_hal.backends._libraries.library import adapted as of

LIBRARIES = (
    Library(
        "flash_mla",
        ("flash_mla_interface.flash_mla_sparse_fwd", "flash_mla_interface.FlashMLASchedMeta"),
        "install flash_mla of Hygon's DAS for this DTK",
    ),
)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    return of(__package__, LIBRARIES)
