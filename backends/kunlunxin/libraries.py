"""Other people's kernels for Kunlunxin's XPUs: kunlun_ops, which is closed. vLLM-Kunlun's calls say what its functions
are given, and not always what they do.

Left to Triton and torch:

- ``fast_topkv2``: it finds 2048 of a row and no other number, and neither its order among equals is said, nor what it
  does with a NaN or writes for a short row.
- ``topk_per_row`` of xspeedgate_ops: the same is not said.
- ``sparse_prefill_fwd_opt``, ``fwd_kvcache_mla``, ``paged_attention``: they want lengths on the host as well, which no
  op here reads back, and what the first does with its ``is_causal`` over chosen keys is not said.
- ``moe_sigmoid_group_topk_norm``, ``moe_pre_sorted``, ``moe_fc``, ``moe_post``: how they round, order an expert's
  rows and treat absent experts is not said.
- ``I8_mqa_logits``, ``I8_paged_mqa_logits``: int8, which no format here is.
- ``swiglu``'s ``limit``: whether it clamps before or after the sigmoid is not said.
- vLLM-Kunlun's quantising ops of ``torch.ops._C``: several are registered and do nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.library import Library
from glm5_hal.backends._libraries.library import adapted as of

LIBRARIES = (
    Library(
        "kunlun_ops",
        ("rmsnorm", "add_rmsnorm", "swiglu"),
        "install kunlun_ops as vLLM-Kunlun's installation page says: https://github.com/baidu/vLLM-Kunlun",
        versions=">=0.1.58",
    ),
)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    return of(__package__, LIBRARIES)
