"""lightning_indexer by npu_lightning_indexer, which keeps no scores.

Its conventions, and what is done about them:

- positions within the request, the causal mask first, no scale of its own: as ours.
- what stands where a token sees fewer keys than are asked for is not said, and the vendor's own test has the positions
  that the mask hides there: these become -1, and -1 comes last.
- lengths of queries are where each request ends, without a leading 0.
- head weights stay in float32, so they are not rounded. Ascend950 takes none: it is left to others.
- what becomes of a key with a NaN is not said. The vendor's test sorts it first, against our rule that it is never
  chosen; nothing short of reading every key could tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._libraries.physical import requests_of, visible
from glm5_hal.backends.ascend.indices import valid_first
from glm5_hal.backends.ascend.needs import A2_A3, HALVES, PAGES, floats, has
from glm5_hal.capability import contiguous, dtype, limit, one_of, when
from glm5_hal.signature import Signature

#: How many keys it chooses: up to 2048, or whole thousands of 1024.
COUNTS = (3072, 4096, 5120, 6144, 7168, 8192)


def _counted(call: Signature) -> bool:
    return call.scalars["top_k"] <= 2048 or call.scalars["top_k"] in COUNTS


@kernel(
    "lightning_indexer",
    "aclnn",
    requires=(
        A2_A3,
        *has("npu_lightning_indexer"),
        one_of("cache_format", "bf16_128"),
        *floats("q", "index_cache", allowed=HALVES),
        dtype("weights", "float32"),
        one_of("D", 128),
        limit("H", 64),
        PAGES,
        contiguous("index_cache"),
        when(
            _counted,
            f"top_k is 2048 at most, or one of {', '.join(map(str, COUNTS))}",
            "use top_k=2048, as GLM-5 does, or another kernel",
            reads=(("top_k", "value"),),
        ),
    ),
    provides=("graph_safe",),
)
def lightning_indexer(
    q: Tensor,
    weights: Tensor,
    index_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    top_k: int,
    cache_format: str = "bf16_128",
) -> Tensor:
    if any(t.numel() == 0 for t in (q, index_cache, block_table)):
        return seq_lens.new_full((len(q), top_k), -1)
    indices, _ = torch.ops.npu.npu_lightning_indexer(
        q.contiguous(),
        index_cache[:, :, None],
        weights.contiguous(),
        actual_seq_lengths_query=cu_seqlens_q[1:].contiguous(),
        actual_seq_lengths_key=seq_lens.contiguous(),
        block_table=block_table.contiguous(),
        layout_query="TND",
        layout_key="PA_BSND",
        sparse_count=top_k,
        sparse_mode=3,  # causal, bottom-right aligned
    )
    seen = visible(cu_seqlens_q, seq_lens, requests_of(cu_seqlens_q, len(q)))
    return valid_first(indices[:, 0].masked_fill(indices[:, 0] >= seen[:, None], -1))
