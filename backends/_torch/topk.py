"""Exact top-k with a total order, faster than a full sort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._torch.numbers import in_host_memory

#: One score in so many is looked at to guess how high the chosen ones lie.
STRIDE = 16


@kernel(
    "topk_indices",
    "torch",
    provides=("deterministic", "batch_invariant", "canonical_ties", "sorted_indices", "graph_safe"),
)
def topk_indices(scores: Tensor, seq_lens: Tensor, *, top_k: int) -> Tensor:
    out = seq_lens.new_full((scores.shape[0], top_k), -1)
    if in_host_memory(scores):
        choose(scores, seq_lens.tolist(), out)
    else:
        _by_rank(scores, seq_lens, out)
    return out


def choose(scores: Tensor, lengths: Sequence[int], out: Tensor) -> None:
    """Row t of ``out [T, K]``, full of -1, begins with the best of the first ``lengths[t]`` scores, ascending."""
    if not in_host_memory(scores):
        _by_rank(scores, torch.tensor(lengths, device=scores.device), out)
        return
    for row, length, places in zip(scores, lengths, out, strict=True):
        found = _best(row[:length], out.shape[1])
        places[: len(found)] = found


def _best(row: Tensor, k: int) -> Tensor:
    """Positions of the k best of ``row``: a few candidates are found first, by a guess that is usually right."""
    lowest = torch.finfo(row.dtype).min  # neither NaN nor -inf is as high
    candidates = (row >= max(_guess(row, k), lowest)).nonzero()[:, 0]
    if len(candidates) < k:
        candidates = (row >= lowest).nonzero()[:, 0]
    if len(candidates) <= k:
        return candidates
    # topk breaks ties as it likes, so only its smallest value is used: everything above is in, and of those that equal
    # it the first ones fill the places that are left.
    values = row.index_select(0, candidates)
    kth = values.topk(k, sorted=False).values.amin()
    above, level = values > kth, values == kth
    room = k - above.sum()
    return candidates[above | (level & (level.cumsum(0) <= room))]


def _guess(row: Tensor, k: int) -> float:
    """A score that more than k others are likely to reach, by a sample; -inf where sampling does not pay."""
    sample = row[::STRIDE]
    enough = k // STRIDE + 64
    if 4 * enough > len(sample):
        return -torch.inf
    return float(
        sample.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).topk(enough, sorted=False).values.amin()
    )


def _by_rank(scores: Tensor, lengths: Tensor, out: Tensor) -> None:
    """The same for all rows at once, with nothing read by the host: every score gets the rank of its place."""
    T, S = scores.shape
    top_k = out.shape[1]
    k = min(top_k, S)
    if T == 0 or k == 0:
        return
    positions = torch.arange(S, device=scores.device)
    values = torch.where((positions >= lengths[:, None]) | scores.isnan(), -torch.inf, scores)
    kth = values.topk(k, dim=-1).values[:, -1:]
    above = values > kth
    level = (values == kth) & (values != -torch.inf)
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= room))
    places = torch.where(chosen, chosen.cumsum(-1) - 1, top_k)
    ranked = out.new_full((T, top_k + 1), -1).scatter_(1, places, positions.to(out.dtype).expand(T, S))
    out.copy_(ranked[:, :top_k])
