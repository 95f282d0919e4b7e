"""The lightning indexer's scores: a program scores a block of keys for some tokens of one request, one after the other;
or, where requests have about one token each, blocks of keys one after the other for a token.

Every token has its own product, keys [n, D] by heads [D, h], so that its bits do not depend on its neighbours.

Legend: T tokens, H index heads, D index head dim, B requests, M pages per request, P page size, S keys.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from glm5_hal.backends._triton.declare import addresses, launch, triton_kernel
from glm5_hal.backends._triton.ragged import block_of
from glm5_hal.backends._triton.rows import fields, latent_rows
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.capability import limit
from glm5_hal.formats import FORMATS

#: A key is read whole.
KEY = limit("D", 512)


@triton_kernel("indexer_logits", requires=(KEY,), provides=("deterministic", "batch_invariant", "graph_safe"))
def indexer_logits(
    tuning: Tuning,
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
    out = weights.new_empty(q.shape[0], max_seq_len)
    scorer = Scorer(tuning, q, weights, index_cache, block_table, seq_lens, cu_seqlens_q, cache_format)
    scorer.score(range(len(q)), 0, out)
    return out


class Scorer:
    """Scores of a batch's tokens, over any stretch of their keys."""

    def __init__(
        self,
        tuning: Tuning,
        q: Tensor,
        weights: Tensor,
        index_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor,
        cache_format: str,
    ) -> None:
        (_, H, D), (B, M) = q.shape, block_table.shape
        cache = fields(FORMATS[cache_format], (index_cache,), D)
        latent, _, scale = (cache.args[i : i + 3] for i in (0, 3, 6))
        self._q, self._B, self._offsets = q, B, cu_seqlens_q.contiguous()
        self._batch = (block_table.contiguous(), seq_lens.contiguous(), self._offsets)
        self._args = (q, weights, *latent, *scale, *q.stride(), *weights.stride(), B, M, H)
        kind = cache.compute(q.dtype)
        sizes = tuning.products("indexer_logits", kind.primitive_bitwidth // 8)
        sizes["HEADS"] = min(sizes["HEADS"], max(triton.next_power_of_2(H), 16))
        self._tiles, self._programs, self.keys = sizes.pop("TILES"), sizes.pop("PROGRAMS"), sizes["KEYS"]
        if len(q) <= 2 * B:
            sizes["TOKENS"] = 1
        else:
            self._tiles = 1
        self._tokens = sizes["TOKENS"]
        self._meta = {
            "BLOCK_B": triton.next_power_of_2(max(B, 1)),
            "GROUPS": triton.cdiv(H, sizes["HEADS"]),
            "BLOCK_D": max(triton.next_power_of_2(D), 16),
            "D": D,
            "PAGE": index_cache.shape[1],
            "GROUP": cache.group,
            "TYPE": kind,
            "FP8": tuning.fp8,
            "INDEX": addresses(tuning),
            **sizes,
        }

    def score(self, tokens: range, start: int, out: Tensor, limits: Tensor | None = None) -> None:
        """Row i of ``out [n, S]`` gets the scores of token ``tokens[i]`` for keys start to start + S - 1.

        Keys that a token does not see score -inf; or, given ``limits [n]``, nothing is written for them, and
        ``limits[i]`` becomes the number of keys that the token sees. ``start`` is a multiple of ``self.keys``, so that
        every key lies at the same place of a block wherever one starts.
        """
        n, S = out.shape
        whole = n == len(self._q)
        part = self._offsets if whole else self._offsets.clamp(tokens.start, tokens.stop)
        blocks = min(triton.cdiv(n, self._tokens) + self._B, n)
        tiles = triton.cdiv(S, self.keys)
        some = max(min(self._tiles, tiles * blocks // self._programs), 1)
        some = 1 << (some.bit_length() - 1)  # few forms
        launch(
            _scores, (triton.cdiv(tiles, some), blocks), out, *self._args, *self._batch, part,
            out, out if limits is None else limits, out.stride(0), tokens.start, start, S,
            FILL=limits is None, TILES=some, **self._meta,
        )  # fmt: skip


@triton.jit(do_not_specialize=("begin", "start"))  # one form for all tiles
def _scores(
    q, weights, latent, latent_page, latent_row, scale, scale_page, scale_row,
    q_token, q_head, q_col, weight_token, weight_head, B, M, H,
    block_table, seq_lens, offsets, part, out, limits, out_row, begin, start, S,
    FILL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr, FP8: tl.constexpr, INDEX: tl.constexpr,
    KEYS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    request, first, stop = block_of(tl.program_id(1), part, B, TOKENS, BLOCK_B)
    if request >= B:
        return
    stop = tl.minimum(first + TOKENS, stop)
    # A token sees its own key and those before it; the last one of its request sees all.
    seen = tl.load(seq_lens + request) - tl.load(offsets + request + 1) + 1
    if not FILL:
        t = first + tl.arange(0, TOKENS)
        tl.store(limits + t - begin, tl.maximum(seen + t, 0), mask=(t < stop) & (tl.program_id(0) == 0))
    block_table += request.to(INDEX) * M
    last = tl.minimum(S, seen + stop - 1 - start)  # columns that any of the tokens sees
    low = tl.program_id(0) * (KEYS * TILES)
    high = tl.minimum(low + KEYS * TILES, S)
    n = tl.arange(0, KEYS)
    dim = tl.arange(0, BLOCK_D)
    for block in range(low, tl.minimum(high, last), KEYS):
        col = block + n
        key = start + col
        some = col < last
        if PAGE % KEYS:
            page = tl.load(block_table + key // PAGE, mask=some, other=0).to(INDEX)
            slot = key % PAGE
            row, row_scale = page * latent_page + slot * latent_row, page * scale_page + slot * scale_row
            in_latent, in_scale = latent, scale
        else:  # a block lies in one page
            page = tl.load(block_table + (start + block) // PAGE).to(INDEX)
            slot = (start + block) % PAGE + n
            row, row_scale = slot * latent_row, slot * scale_row
            in_latent, in_scale = latent + page * latent_page, scale + page * scale_page
        keys = latent_rows(in_latent, row, in_scale, row_scale, some, D, BLOCK_D, GROUP, TYPE, FP8)
        if TOKENS == 1:
            score = _score(q, weights, keys, first, dim, q_token, q_head, q_col, weight_token, weight_head, H, D,
                           TYPE, INDEX, HEADS, GROUPS)  # fmt: skip
            _put(out, score, first, begin, out_row, col, S, key < seen + first, FILL, INDEX)
        else:
            for i in range(stop - first):
                token = first + i
                score = _score(q, weights, keys, token, dim, q_token, q_head, q_col, weight_token, weight_head, H, D,
                               TYPE, INDEX, HEADS, GROUPS)  # fmt: skip
                _put(out, score, token, begin, out_row, col, S, key < seen + token, FILL, INDEX)
    if FILL:
        unseen = low + (tl.maximum(last - low, 0) + KEYS - 1) // KEYS * KEYS
        nothing = tl.full((KEYS,), float("-inf"), tl.float32)
        for block in range(unseen, high, KEYS):
            for i in range(stop - first):
                _put(out, nothing, first + i, begin, out_row, block + n, S, n < 0, FILL, INDEX)


@triton.jit
def _score(
    q, weights, keys, token, dim, q_token, q_head, q_col, weight_token, weight_head, H,
    D: tl.constexpr, TYPE: tl.constexpr, INDEX: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A token's scores of ``keys [n, D]``."""
    at = token.to(INDEX)
    score = tl.zeros((keys.shape[0],), tl.float32)
    for group in tl.static_range(GROUPS):
        head = group * HEADS + tl.arange(0, HEADS)
        real = head < H
        query = tl.load(
            q + at * q_token + head[None, :] * q_head + dim[:, None] * q_col,
            mask=real[None, :] & (dim < D)[:, None], other=0.0,
        ).to(TYPE)  # fmt: skip
        weight = tl.load(weights + at * weight_token + head * weight_head, mask=real, other=0.0)
        product = tl.dot(keys, query, input_precision="ieee")
        terms = tl.where(product < 0, 0.0, product) * weight[None, :]  # a NaN stays one
        score += tl.sum(tl.where(real[None, :], terms, 0.0), 1)
    return score


@triton.jit
def _put(out, score, token, begin, out_row, col, S, sees, FILL: tl.constexpr, INDEX: tl.constexpr):
    """Scores of the columns ``col`` that a token ``sees``; -inf for others if FILL, else nothing."""
    to = out + (token - begin).to(INDEX) * out_row + col
    if FILL:
        tl.store(to, tl.where(sees, score, float("-inf")), mask=col < S)
    else:
        tl.store(to, score, mask=(col < S) & sees)
