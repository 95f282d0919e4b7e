"""Other people's kernels for Cambricon's MLUs: torch_mlu_ops, Cambricon's own. It is closed; each of its functions
says in its documentation what it computes, of which shapes and types.

Left to Triton and torch:

- ``moe_gen_idx`` and ``moe_expand_input``: they know no expert that is elsewhere, and do not say how an expert's rows
  are ordered.
- ``moe_combine_result``: it reads a row for an absent expert too, and does not say when it rounds.
- ``apply_rotary``, ``fused_rope``: cos and sin have the activations' dtype, and `rope` has them in fp32.
- ``masked_indexer_select_paged_kv``: two versions differ in what they return, and it gives places, not positions.
- ``flash_attention``: what it does with more queries than keys is not said.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm5_hal.backend import Kernel
from glm5_hal.backends._libraries.library import Library
from glm5_hal.backends._libraries.library import adapted as of

INSTALL = "install torch_mlu_ops of Cambricon's SDK, for this torch_mlu: https://developer.cambricon.com"
VERSIONS = ">=1.6"


def _library(adapter: str, *needs: str) -> Library:
    return Library("torch_mlu_ops", needs, INSTALL, versions=VERSIONS, adapter=adapter)


LIBRARIES = (
    _library("attention", "single_query_cached_kv_attn"),
    _library("elementary", "fused_rms_norm", "active"),
    _library("caches", "reshape_paged_cache"),
    _library("experts", "moe_sigmoid_topk", "moe_softmax_topk", "group_gemm"),
)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    return of(__package__, LIBRARIES)
