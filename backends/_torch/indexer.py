"""The lightning indexer: scores of all keys, or only the best keys with no more than a block of scores kept.

Legend: T tokens, H index heads, D index head dim, n keys of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._torch.blocks import blocks
from glm5_hal.backends._torch.caches import Tiles
from glm5_hal.backends._torch.numbers import accumulation
from glm5_hal.backends._torch.topk import choose
from glm5_hal.formats import FORMATS
from glm5_hal.ops._common.products import linear

#: Keys per tile: 2048 rows of 128 numbers in fp32 are 1 MB. Larger ones are a fifth faster over 128K keys, but samples
#: in which the suite looks for wrong tiles would be one tile then.
KEYS = 2048
#: Tokens of one request that share a tile, and whose scores are kept at a time. Each has its own products, so that its
#: bits do not depend on the others.
TOKENS = 16


@kernel("indexer_logits", "torch", provides=("deterministic", "batch_invariant"))
def indexer_logits(
    q: Tensor,
    weights: Tensor,
    index_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    max_seq_len: int,
    cache_format: str = "bf16_128",
) -> Tensor:
    out = weights.new_full((q.shape[0], max_seq_len), -torch.inf)
    scorer = _Scorer(q, weights, index_cache, cache_format, max_seq_len)
    for r, block, limits in blocks(cu_seqlens_q, seq_lens, TOKENS):
        within = [min(limit, max_seq_len) for limit in limits]
        scorer.score(block, within, block_table[r], out[block.start : block.stop])
    return out


@kernel(
    "lightning_indexer",
    "torch",
    provides=("deterministic", "batch_invariant", "canonical_ties", "sorted_indices"),
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
    out = block_table.new_full((q.shape[0], top_k), -1, dtype=torch.int32)
    work = blocks(cu_seqlens_q, seq_lens, TOKENS)
    longest = max((limits[-1] for *_, limits in work), default=0)
    kept = weights.new_empty(max((len(block) for _, block, _ in work), default=0), longest)
    scorer = _Scorer(q, weights, index_cache, cache_format, longest)
    for r, block, limits in work:
        scorer.score(block, limits, block_table[r], kept)
        choose(kept[: len(block), : limits[-1]], limits, out[block.start : block.stop])
    return out


class _Scorer:
    """Scores of tokens against keys, read tile by tile."""

    def __init__(self, q: Tensor, weights: Tensor, index_cache: Tensor, cache_format: str, longest: int) -> None:
        self._q, self._weights, self._dtype = q, weights, accumulation(weights)
        self._tiles = Tiles(FORMATS[cache_format], (index_cache,), q.shape[-1], 0, self._dtype, min(longest, KEYS))

    def score(self, block: range, limits: list[int], pages: Tensor, out: Tensor) -> None:
        """Row i of ``out`` gets the scores of token ``block[i]`` for the keys before ``limits[i]``, and no others."""
        q_HD = [self._q[t].to(self._dtype, copy=True) for t in block]
        w_H = [self._weights[t].to(self._dtype, copy=True) for t in block]
        for start in range(0, limits[-1], KEYS):
            keys = self._tiles.between(pages, start, min(start + KEYS, limits[-1]))
            for i, limit in enumerate(limits):
                if limit > start:
                    logits_nH = linear(keys[: limit - start], q_HD[i]).relu_()
                    out[i, start : start + len(logits_nH)] = logits_nH @ w_H[i]
