"""Attention, tile by tile: memory does not grow with the number of keys.

Legend: T tokens, H heads, W = L+R absorbed width (latent, rope), D head dim, n keys of a tile, K indices per token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends._torch.blocks import blocks
from glm5_hal.backends._torch.caches import Tiles
from glm5_hal.backends._torch.numbers import accumulation, has_fast_products, in_host_memory
from glm5_hal.formats import FORMATS
from glm5_hal.ops._common import caches as bytes_of
from glm5_hal.ops._common.paging import requests
from glm5_hal.ops._common.products import linear, multiply
from glm5_hal.plan import host_list

#: Keys per tile in the absorbed form: 1024 rows of 576 numbers in fp32 are 2.4 MB.
KEYS = 1024
#: Chosen keys that are one tile where weights and latents are multiplied in bfloat16. GLM-5's top-k is 2048.
CHOSEN_KEYS = 4096
#: Tokens of one request that share a tile. Each has its own products, so that its bits do not depend on the others.
TOKENS = 16
#: Tile of the form with full heads.
PREFILL_QUERIES = 128
PREFILL_KEYS = 512
PREFILL_HEADS = 8


class Softmax:
    """Sums of values weighted by the softmax of scores, over keys that come tile by tile (online softmax)."""

    def __init__(self) -> None:
        self._tiles = 0
        self._peak = self._total = self._sum = torch.empty(0)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """``scores [..., m, n]``, which are used up, of n keys with ``values [..., n, D]``."""
        peak = scores.amax(-1, keepdim=True)
        if self._tiles:
            peak = torch.maximum(peak, self._peak)
        base = _finite(peak)
        weights = scores.sub_(base).exp_()
        total, sums = weights.sum(-1, keepdim=True), weights @ values
        if self._tiles:
            shrink = (self._peak - base).exp_()
            total, sums = total.addcmul_(self._total, shrink), sums.addcmul_(self._sum, shrink)
        self._peak, self._total, self._sum = peak, total, sums
        self._tiles += 1

    def result(self) -> tuple[Tensor, Tensor]:
        """The weighted means ``[..., m, D]`` and the natural-log lse ``[..., m]``."""
        return self._sum / self._total, (self._total.log() + _finite(self._peak)).squeeze(-1)


def softmax_mean(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What `Softmax` gives where all keys come as one tile: scores [m, n], values [n, D].

    Weights are divided by their sum before they are rounded to the dtype of the values: the result is rounded once.
    That sum is one over the largest weight, which is exp(0) before.
    """
    weights, peak = scores.softmax(-1), scores.amax(-1)
    lse = peak - weights.amax(-1).log()
    return multiply(weights.to(values.dtype), values), lse.fmax(peak)  # NaN weights of an infinite peak say nothing


def _finite(peak: Tensor) -> Tensor:
    """What to subtract before exp: inf − inf would be NaN."""
    return peak.masked_fill(peak.isinf(), 0.0)


@kernel("mla_prefill", "torch", provides=("deterministic",))
def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    out = q.new_zeros(T, H, v.shape[-1])
    lse = q.new_full((T, H), -torch.inf, dtype=accumulation(q))
    spans = zip(pairwise(host_list(cu_seqlens_q)), pairwise(host_list(cu_seqlens_k)), strict=True)
    for (start, stop), (low, high) in spans:
        ahead = (high - low) - (stop - start)  # keys that come before the first query's own
        seeing = start if high > low else stop
        if causal:
            seeing = max(seeing, start - ahead)
        for first in range(seeing, stop, PREFILL_QUERIES):
            rows = slice(first, min(first + PREFILL_QUERIES, stop))
            limits = range(rows.start - start + ahead + 1, rows.stop - start + ahead + 1) if causal else None
            for head in range(0, H, PREFILL_HEADS):
                heads = slice(head, head + PREFILL_HEADS)
                found = _prefill_tile(q[rows, heads], k[low:high, heads], v[low:high, heads], limits, scale)
                out[rows, heads] = found[0].transpose(0, 1)
                lse[rows, heads] = found[1].T
    return out, lse


def _prefill_tile(q: Tensor, k: Tensor, v: Tensor, limits: range | None, scale: float) -> tuple[Tensor, Tensor]:
    """Queries [m, H, D] over keys [n, H, D]; query i sees the first ``limits[i]``, at least one (None: all)."""
    dtype = accumulation(q)
    q_HmD = q.transpose(0, 1).to(dtype) * scale
    state, end = Softmax(), len(k) if limits is None else limits[-1]
    for start in range(0, end, PREFILL_KEYS):
        stop = min(start + PREFILL_KEYS, end)
        k_HnD, v_HnD = (x[start:stop].transpose(0, 1).to(dtype) for x in (k, v))
        scores = q_HmD @ k_HnD.transpose(1, 2)
        if limits is not None and stop > limits[0]:
            positions = torch.arange(start, stop, device=q.device)
            seen = torch.arange(limits.start, limits.stop, device=q.device)
            scores.masked_fill_(positions >= seen[:, None], -torch.inf)
        state.add(scores, v_HnD)
    return state.result()


@kernel("mla_decode", "torch", provides=("deterministic", "batch_invariant"))
def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    rope_cache: Tensor | None = None,
    *,
    scale: float,
    kv_lora_rank: int,
    cache_format: str = "latent_576",
) -> tuple[Tensor, Tensor]:
    out, lse = _no_keys(q, kv_lora_rank)
    work = blocks(cu_seqlens_q, seq_lens, TOKENS)
    longest = max((limits[-1] for *_, limits in work), default=0)
    absorbed = _Absorbed(q, kv_cache, rope_cache, kv_lora_rank, cache_format, keys=longest)
    for r, block, limits in work:
        queries, states = [_query(q[t], scale) for t in block], [Softmax() for _ in block]
        for start in range(0, limits[-1], KEYS):
            keys = absorbed.tiles.between(block_table[r], start, min(start + KEYS, limits[-1]))
            for query, state, limit in zip(queries, states, limits, strict=True):
                if limit > start:
                    absorbed.attend(state, query, keys[: limit - start])
        for t, state in zip(block, states, strict=True):
            out[t], lse[t] = state.result()
    return out, lse


@kernel("sparse_mla", "torch", provides=("deterministic", "batch_invariant"))
def sparse_mla(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    rope_cache: Tensor | None = None,
    *,
    scale: float,
    kv_lora_rank: int,
    cache_format: str = "latent_576",
) -> tuple[Tensor, Tensor]:
    out, lse = _no_keys(q, kv_lora_rank)
    absorbed = _Absorbed(q, kv_cache, rope_cache, kv_lora_rank, cache_format, chosen=indices.shape[1])
    for r, tokens, length in requests(cu_seqlens_q, seq_lens):
        for t in range(tokens.start, tokens.stop if length else tokens.start):
            chosen, valid = _chosen(indices[t])
            if len(chosen):
                found = absorbed.over(_query(q[t], scale), block_table[r], chosen, valid)
                out[t], lse[t] = found if valid is None else _unless_none(*found, valid.any())
    return out, lse


def _chosen(indices: Tensor) -> tuple[Tensor, Tensor | None]:
    """The positions to read of one token, and which of them count (None: all).

    Where counting the valid ones would make the host wait, all K are read: the first valid one stands in for every
    -1, and position 0 where there is none, of a request that has keys.
    """
    valid = indices >= 0
    if in_host_memory(indices) or indices.numel() == 0:
        return indices[valid], None
    first = indices.index_select(0, valid.int().argmax(keepdim=True)).clamp_min(0)
    return torch.where(valid, indices, first), valid


def _unless_none(out: Tensor, lse: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """The result, or that of no key where there was not ``some``."""
    return torch.where(some, out, 0.0), torch.where(some, lse, -torch.inf)


def _no_keys(q: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """What tokens get that see no key."""
    T, H, _ = q.shape
    return q.new_zeros(T, H, latent), q.new_full((T, H), -torch.inf, dtype=accumulation(q))


def _query(q: Tensor, scale: float) -> Tensor:
    """One token's queries [H, W], scaled, in memory of their own: bits must not depend on where the batch has them."""
    return q.to(accumulation(q)) * scale


class _Absorbed:
    """Attention of single tokens over tiles of a latent cache, whether over ``keys`` in a row or ``chosen`` ones."""

    def __init__(
        self, q: Tensor, kv_cache: Tensor, rope_cache: Tensor | None, latent: int, cache_format: str, *,
        keys: int = 0, chosen: int = 0,
    ) -> None:  # fmt: skip
        fmt, held = FORMATS[cache_format], bytes_of.held(kv_cache, rope_cache)
        self._at_once = 0 < chosen <= CHOSEN_KEYS and has_fast_products(kv_cache)
        most = chosen if self._at_once else min(max(keys, chosen), KEYS)
        self.tiles = Tiles(fmt, held, latent, q.shape[-1] - latent, accumulation(q), most)
        self._latent = latent

    def attend(self, state: Softmax, query: Tensor, keys: Tensor, valid: Tensor | None = None) -> None:
        """Let [H, W] queries see a tile of keys [n, W], or the ``valid`` ones of them."""
        state.add(_scores(query, keys, valid), keys[:, : self._latent])

    def over(self, query: Tensor, pages: Tensor, positions: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """[H, W] queries over the keys at these positions of a request, or the ``valid`` ones: out [H, L], lse [H]."""
        if self._at_once and valid is None:
            rows = self.tiles.rows(pages, positions)
            return softmax_mean(linear(query, self.tiles.numbers(rows)), self.tiles.latents(rows))
        state = Softmax()
        for start in range(0, len(positions), KEYS):
            part = slice(start, start + KEYS)
            self.attend(state, query, self.tiles.at(pages, positions[part]), None if valid is None else valid[part])
        return state.result()


def _scores(query: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """[H, W] queries times keys [n, W]; -inf for those that are not ``valid``."""
    scores = linear(query, keys)
    return scores if valid is None else scores.masked_fill_(~valid, -torch.inf)
