"""A ragged batch, a few tokens at a time."""

from __future__ import annotations

from torch import Tensor

from glm5_hal.ops._common.paging import requests


def blocks(cu_seqlens_q: Tensor, seq_lens: Tensor, most: int) -> list[tuple[int, range, list[int]]]:
    """(request, up to ``most`` of its tokens, how many keys each sees) of all tokens that see any, in order.

    Tokens of a block are neighbours, so each sees one key more than the one before.
    """
    found = []
    for r, tokens, length in requests(cu_seqlens_q, seq_lens):
        seeing = max(tokens.start, tokens.stop - length)
        for first in range(seeing, tokens.stop, most):
            block = range(first, min(first + most, tokens.stop))
            found.append((r, block, [length - tokens.stop + t + 1 for t in block]))
    return found
