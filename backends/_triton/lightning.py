"""Scores and top-k in one: the scores of a tile of keys at a time, next to the best of the tiles before.

A tile is as wide as memory for its scores allows, so few tokens need one tile only. Where tokens are many they are
taken in chunks. Neither shows in the result: a score's bits do not depend on its tile, and the choice is exact.

Legend: T tokens, S keys that a block table has room for.
"""

from __future__ import annotations

import triton
from torch import Tensor

from glm5_hal import plan
from glm5_hal.backends._triton import topk
from glm5_hal.backends._triton.declare import triton_kernel
from glm5_hal.backends._triton.indexer import KEY, Scorer
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.context import capturing


@triton_kernel("lightning_indexer", requires=(KEY,), provides=topk.CLAIMS)
def lightning_indexer(
    tuning: Tuning,
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
    T, S = len(q), _longest(seq_lens, block_table.shape[1] * index_cache.shape[1])
    if T == 0 or S == 0:
        return seq_lens.new_full((T, top_k), -1)
    scorer = Scorer(tuning, q, weights, index_cache, block_table, seq_lens, cu_seqlens_q, cache_format)
    width, rows = _tile(tuning, T, S, scorer.keys)
    out = seq_lens.new_empty(T, top_k)
    for first in range(0, T, rows):
        tokens = range(first, min(first + rows, T))
        scores, limits, best = weights.new_empty(len(tokens), width), seq_lens.new_empty(len(tokens)), None
        for start in range(0, S, width):
            tile = topk.Scores(scores[:, : S - start], limits, start)
            scorer.score(tokens, start, tile.values, limits)
            if start + width < S:
                best = topk.better(tuning, tile, best, top_k)
            else:
                topk.choose(tuning, tile, best, out[first : tokens.stop])
    return out


def _longest(seq_lens: Tensor, room: int) -> int:
    """As many keys as a request may have: the step's plan knows better than the block table. A graph that is captured
    serves other steps too."""
    step = plan.current_plan()
    lengths = None if step is None or capturing() else step.host_of(seq_lens)
    return room if lengths is None else min(room, max(lengths, default=0))


def _tile(tuning: Tuning, T: int, S: int, keys: int) -> tuple[int, int]:
    """Keys of a tile, a multiple of ``keys``, and tokens of a chunk. Together they are SCORES scores at most."""
    sizes = tuning["lightning_indexer"]
    width = max(sizes["SCORES"] // T, sizes["TILE"]) // keys * keys
    width = min(max(width, keys), triton.cdiv(S, keys) * keys)
    return width, max(sizes["SCORES"] // width, 1)
