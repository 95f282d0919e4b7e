"""The lightning indexer: scores of all keys, or only the best keys with no more than a block of scores kept.

Legend: T tokens, H index heads, D index head dim, n keys of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._torch.caches import Tiles
from glm5_hal.backends._torch.numbers import accumulation
from glm5_hal.backends._torch.topk import choose
from glm5_hal.ops._common.paging import requests
from glm5_hal.state import FORMATS

#: Keys per tile: 2048 rows of 128 numbers in fp32 are 1 MB.
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
    for r, tokens, length in requests(cu_seqlens_q, seq_lens):
        limits = [min(length - tokens.stop + t + 1, max_seq_len) for t in range(tokens.start, tokens.stop)]
        scorer.score(tokens.start, limits, block_table[r], out[tokens])
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
    work = [(r, tokens, n) for r, tokens, n in requests(cu_seqlens_q, seq_lens) if n and tokens.stop > tokens.start]
    longest = max((n for *_, n in work), default=0)
    rows = min(max((tokens.stop - tokens.start for _, tokens, _ in work), default=0), TOKENS)
    kept = weights.new_empty(rows, longest)
    scorer = _Scorer(q, weights, index_cache, cache_format, longest)
    for r, tokens, length in work:
        for first in range(tokens.start, tokens.stop, TOKENS):
            block = range(first, min(first + TOKENS, tokens.stop))
            limits = [max(length - tokens.stop + t + 1, 0) for t in block]
            scorer.score(first, limits, block_table[r], kept)
            choose(kept[: len(block), : limits[-1]], limits, out[block.start : block.stop])
    return out


class _Scorer:
    """Scores of tokens against keys, read tile by tile."""

    def __init__(self, q: Tensor, weights: Tensor, index_cache: Tensor, cache_format: str, longest: int) -> None:
        self._q, self._weights, self._dtype = q, weights, accumulation(weights)
        most, (_, H, D) = min(longest, KEYS), q.shape
        self._tiles = Tiles(FORMATS[cache_format], (index_cache,), D, 0, self._dtype, most)
        self._room = q.new_empty(H * most, dtype=self._dtype)

    def score(self, first: int, limits: list[int], pages: Tensor, out: Tensor) -> None:
        """Row i of ``out`` gets the scores of token ``first + i`` for the keys before ``limits[i]``, and no others."""
        for t in range(0, len(limits), TOKENS):
            self._score(first + t, limits[t : t + TOKENS], pages, out[t : t + TOKENS])

    def _score(self, first: int, limits: list[int], pages: Tensor, out: Tensor) -> None:
        q_HD = [self._q[first + i].to(self._dtype, copy=True) for i in range(len(limits))]
        w_1H = [self._weights[first + i][None].to(self._dtype, copy=True) for i in range(len(limits))]
        end = max(limits, default=0)
        for start in range(0, end, KEYS):
            keys = self._tiles.between(pages, start, min(start + KEYS, end))
            for i, limit in enumerate(limits):
                if limit > start:
                    seen = keys[: limit - start]
                    logits = self._room[: len(q_HD[i]) * len(seen)].view(-1, len(seen))
                    torch.mm(q_HD[i], seen.T, out=logits).relu_()
                    out[i, start : start + len(seen)] = (w_1H[i] @ logits)[0]
