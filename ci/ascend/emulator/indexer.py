"""npu_lightning_indexer and npu_quant_lightning_indexer.

Scores are Σ_h w_h·ReLU(q_h·k), in float32, without a scale. Positions are sorted by falling score, ties by lower
index (golden code of the quantised op sorts stably; the other one's leaves ties open), and are those inside the
request; what is left of a row is −1. The two golden codes differ about positions that the causal mask hides, where a
row has fewer visible ones than sparse_count: the quantised one writes −1, the plain one lists them last. −1 is taken
here, and `install(hidden_positions=True)` lists them.

The quantised op follows its golden code: int32 products, ReLU, a division by 1024 and a rounding to float16; weights
times query scales in float16; the sum and the key's scale in float32. NaN is undefined there, and silent in the plain
op: it sorts as the largest value. Assumed: sparse_values past a row's positions are −inf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import sequences
from .chip import CHIP
from .constraints import Rules
from .norms import HALF
from .sequences import Keys, Queries

SPARSE_COUNTS = (*range(1, 2049), *range(3072, 8193, 1024))
HEADS_950 = (8, 16, 24, 32, 64)
WIDTH = 128


def lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_key: Tensor | None,
    block_table: Tensor | None,
    layout_query: str,
    layout_key: str,
    sparse_count: int,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    return_value: bool,
) -> tuple[Tensor, Tensor]:
    rules = Rules("npu_lightning_indexer", "torch_npu-npu_lightning_indexer.md")
    _check(rules, query, key, weights, layout_query, layout_key)
    rules.dtype("query", query, *HALF)
    rules.same_dtype(query=query, key=key)
    wide = weights.dtype is torch.float32 and not CHIP.is_950
    rules.need(wide or weights.dtype is query.dtype, "weights have query's dtype, or float32 on A2 and A3", weights)
    need = "sparse_count is 1 to 2048, or 3072, 4096, … 8192"
    rules.need(sparse_count in SPARSE_COUNTS, need, sparse_count)
    sequences.check_tokens(rules, pre_tokens, next_tokens, sparse_mode)
    rules.need(
        not (return_value and layout_key == "PA_BSND"), "return_value is for keys that are not paged", return_value
    )
    _key_strides(rules, {"key": key}, layout_key, paged_strides=CHIP.is_950)
    rows = sequences.queries(rules, query, layout_query, actual_seq_lengths_query)
    batch = len(rows.lengths)
    where = sequences.keys(rules, key, layout_key, actual_seq_lengths_key, block_table, batch, "actual_seq_lengths_key")
    q, k, w = (
        sequences.flat(query, layout_query),
        sequences.flat(key, layout_key),
        sequences.flat(weights, layout_query).float(),
    )

    def score(row: Tensor, slot: Tensor) -> Tensor:
        products = torch.relu(q[row].float() @ k[slot][:, 0].float().T)  # rows, heads, positions
        return (products * w[row][..., None]).sum(1)

    indices, values = _select(rows, where, score, len(q), sparse_count, sparse_mode)
    shape = (*query.shape[:-2], 1, sparse_count)
    chosen = values.to(query.dtype).view(shape) if return_value else query.new_empty(0)
    return indices.view(shape), chosen


def quant_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    query_dequant_scale: Tensor,
    key_dequant_scale: Tensor,
    query_quant_mode: int,
    key_quant_mode: int,
    actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_key: Tensor | None,
    block_table: Tensor | None,
    layout_query: str,
    layout_key: str,
    sparse_count: int,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    query_dtype: int | None,
    key_dtype: int | None,
) -> Tensor:
    rules = Rules("npu_quant_lightning_indexer", "torch_npu-npu_quant_lightning_indexer.md")
    _check(rules, query, key, weights, layout_query, layout_key)
    rules.beyond(query.dtype is torch.uint8 or query_dtype is not None or key_dtype is not None, "hifloat8")
    allowed = (torch.int8, torch.float8_e4m3fn) if CHIP.is_950 else (torch.int8,)
    rules.dtype("query", query, *allowed)
    rules.same_dtype(query=query, key=key)
    _scale_dtypes(rules, query, weights, query_dequant_scale, key_dequant_scale)
    rules.one_of("query_quant_mode", query_quant_mode, (0,))
    rules.one_of("key_quant_mode", key_quant_mode, (0,))
    rules.need(1 <= sparse_count <= 2048, "sparse_count is 1 to 2048", sparse_count)
    sequences.check_tokens(rules, pre_tokens, next_tokens, sparse_mode)
    rules.shape("query_dequant_scale", query_dequant_scale, *query.shape[:-1])
    rules.shape("key_dequant_scale", key_dequant_scale, *key.shape[:-1])
    rules.contiguous(query_dequant_scale=query_dequant_scale)
    strided = {"key": key, "key_dequant_scale": key_dequant_scale}
    _key_strides(rules, strided, layout_key, paged_strides=True)
    rows = sequences.queries(rules, query, layout_query, actual_seq_lengths_query)
    batch = len(rows.lengths)
    where = sequences.keys(rules, key, layout_key, actual_seq_lengths_key, block_table, batch, "actual_seq_lengths_key")
    q, k = sequences.flat(query, layout_query), sequences.flat(key, layout_key)
    scaled = sequences.flat(weights, layout_query) * sequences.flat(query_dequant_scale, layout_query)
    rules.need(not scaled.half().isinf().any(), "weights times query_dequant_scale are within float16", scaled)
    key_scale = sequences.flat(key_dequant_scale, layout_key)[:, 0].float()

    def score(row: Tensor, slot: Tensor) -> Tensor:
        # float32 holds the int32 products exactly: 128 · 128² < 2²⁴
        products = torch.relu(q[row].float() @ k[slot][:, 0].float().T) / 1024.0
        summed = torch.bmm(scaled[row].float()[:, None], products.half().float())[:, 0]
        return summed * key_scale[slot]

    indices, _ = _select(rows, where, score, len(q), sparse_count, sparse_mode)
    return indices.view(*query.shape[:-2], 1, sparse_count)


def _select(
    rows: Queries, where: Keys, score: Callable[[Tensor, Tensor], Tensor], count: int, width: int, sparse_mode: int
) -> tuple[Tensor, Tensor]:
    indices = torch.full((count, width), -1, dtype=torch.int32)
    values = torch.full((count, width), float("-inf"))
    for request, length in enumerate(where.lengths.tolist()):
        mine = rows.request == request
        row, offset = rows.row[mine], rows.offset[mine]
        if not length or not len(row):
            continue
        position = torch.arange(length)
        scores = score(row, where.rows(torch.tensor(request), position))
        behind = length - rows.lengths[request] + offset  # the last position that a causal row sees
        visible = (position <= behind[:, None]) | (sparse_mode == 0)
        best, order = scores.masked_fill(~visible, float("-inf")).sort(dim=1, descending=True, stable=True)
        kept = min(width, length)
        best, order = best[:, :kept], order[:, :kept].int()
        if not CHIP.hidden_positions:
            order = order.masked_fill(torch.arange(kept) >= visible.sum(1, keepdim=True), -1)
        indices[row, :kept], values[row, :kept] = order, best
    return indices, values


def _check(rules: Rules, query: Tensor, key: Tensor, weights: Tensor, layout_query: str, layout_key: str) -> None:
    sequences.check_layouts(rules, query, key, layout_query, layout_key, "layout_key")
    rules.need(query.shape[-1] == key.shape[-1] == WIDTH, f"D of query and key is {WIDTH}", [query, key])
    heads = query.shape[-2]
    allowed = heads in HEADS_950 if CHIP.is_950 else 1 <= heads <= 64
    rules.need(allowed, f"N of query is one of {HEADS_950}" if CHIP.is_950 else "N of query is at most 64", heads)
    rules.shape("weights", weights, *query.shape[:-1])
    rules.contiguous(query=query, weights=weights)


def _key_strides(rules: Rules, tensors: dict[str, Tensor], layout: str, paged_strides: bool) -> None:
    """Keys are contiguous; where they are paged, some chips let the blocks themselves lie apart."""
    for name, tensor in tensors.items():
        if layout == "PA_BSND" and paged_strides:
            rules.need(tensor[0].is_contiguous(), f"{name} is contiguous in all axes but the first", tensor.stride())
        else:
            rules.contiguous(**{name: tensor})


def _scale_dtypes(rules: Rules, query: Tensor, *tensors: Tensor) -> None:
    allowed = [(torch.float16, torch.float16, torch.float16)]
    if query.dtype is torch.float8_e4m3fn:
        allowed.append((torch.bfloat16, torch.float32, torch.float32))
    given = tuple(tensor.dtype for tensor in tensors)
    rules.need(given in allowed, f"weights, query and key scales have dtypes {allowed}", given)


KERNELS = {"npu_lightning_indexer": lightning_indexer, "npu_quant_lightning_indexer": quant_lightning_indexer}
