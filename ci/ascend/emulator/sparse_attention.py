"""npu_sparse_flash_attention and npu_kv_quant_sparse_flash_attention, in their only mode: absorbed MLA.

Both follow their golden code: products and softmax in float32, and a position that the causal mask hides scores −1e12,
so that a row whose every selected position is hidden averages them; the quantised op also rounds keys and
probabilities to query's dtype. A block's positions past the request's end are left out; an index that occurs twice
counts twice. Assumed where the documents are silent: a row that selects nothing, and a padding row, gives zeros, its
softmax_max is −inf and its softmax_sum 0; an index past the request's end breaks "valid index", and so does one below
−1. `value` must hold what key's nope part holds, as both are said to share their data.

The page of the quantised op gives the output query's shape, 576 wide; golden code and the op's shape inference give
512, which is taken. It lets `value` differ from key in width (its example passes 512 columns); only dtype and N count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import sequences
from .chip import CHIP
from .constraints import Rules
from .norms import HALF
from .sequences import Queries

NOPE, ROPE, ROW, TILE = 512, 64, 656, 128
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
HIDDEN = -1e12
CHUNK = 2**26  # gathered elements at a time


@dataclass(frozen=True)
class Selection:
    """For each query row: positions in its request, which of them are real, and which the mask hides."""

    rows: Queries
    slot: Tensor
    real: Tensor
    hidden: Tensor


def sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    block_table: Tensor | None,
    actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_kv: Tensor | None,
    query_rope: Tensor | None,
    key_rope: Tensor | None,
    sparse_block_size: int,
    layout_query: str,
    layout_kv: str,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    attention_mode: int,
    return_softmax_lse: bool,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rules = Rules("npu_sparse_flash_attention", "torch_npu-npu_sparse_flash_attention.md")
    rules.need(attention_mode == 2, "attention_mode is 2", attention_mode)
    rules.given("it is a required argument", value=value)
    rules.given("attention_mode is 2", query_rope=query_rope, key_rope=key_rope)
    assert value is not None
    assert query_rope is not None
    assert key_rope is not None
    sequences.check_layouts(rules, query, key, layout_query, layout_kv, "layout_kv")
    sequences.check_tokens(rules, pre_tokens, next_tokens, sparse_mode)
    rules.dtype("query", query, *HALF)
    rules.same_dtype(query=query, key=key, value=value, query_rope=query_rope, key_rope=key_rope)
    rules.need(query.shape[-1] == key.shape[-1] == NOPE, f"D of query, key and value is {NOPE}", [query, key])
    rules.shape("value", value, *key.shape)
    rules.shape("query_rope", query_rope, *query.shape[:-1], ROPE)
    rules.shape("key_rope", key_rope, *key.shape[:-1], ROPE)
    _heads(rules, query.shape[-2], range(1, 129) if CHIP.is_950 else HEADS)
    _block_sparsity(rules, sparse_block_size, 128, key, layout_kv)
    _sinks(rules, sinks, query.shape[-2])
    no_lse = "return_softmax_lse is for keys that are not paged"
    rules.need(not (return_softmax_lse and layout_kv == "PA_BSND"), no_lse, return_softmax_lse)
    rules.contiguous(query=query, query_rope=query_rope, sparse_indices=sparse_indices)
    _strides(rules, layout_kv, key=key, value=value, key_rope=key_rope)
    shared = "value holds what key holds (they share their data)"
    rules.need(_same_data(key, value), shared, [key, value])
    chosen = _selection(
        rules, query, key, sparse_indices, sparse_block_size, layout_query, layout_kv, sparse_mode,
        actual_seq_lengths_query, actual_seq_lengths_kv, block_table,
    )  # fmt: skip
    q = sequences.flat(torch.cat((query, query_rope), -1), layout_query)
    k, k_rope = sequences.flat(key, layout_kv)[:, 0], sequences.flat(key_rope, layout_kv)[:, 0]

    def gather(slot: Tensor) -> Tensor:
        return torch.cat((k[slot], k_rope[slot]), -1).float()

    out, largest, total = _attend(q, gather, chosen, scale_value, sinks, rounded=False)
    out = out.to(query.dtype).view(query.shape)
    if not return_softmax_lse:
        return out, torch.empty(0), torch.empty(0)
    heads = query.shape[-2]
    if layout_query == "TND":
        return out, largest.view(1, -1, heads), total.view(1, -1, heads)
    shape = (query.shape[0], 1, query.shape[1], heads)
    return out, largest.view(shape), total.view(shape)


def kv_quant_sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_indices: Tensor,
    scale_value: float,
    key_quant_mode: int,
    value_quant_mode: int,
    key_dequant_scale: Tensor | None,
    value_dequant_scale: Tensor | None,
    block_table: Tensor | None,
    actual_seq_lengths_query: Tensor | None,
    actual_seq_lengths_kv: Tensor | None,
    sparse_block_size: int,
    layout_query: str,
    layout_kv: str,
    sparse_mode: int,
    pre_tokens: int,
    next_tokens: int,
    attention_mode: int,
    quant_scale_repo_mode: int,
    tile_size: int,
    rope_head_dim: int,
    key_dtype: int | None,
    value_dtype: int | None,
) -> Tensor:
    rules = Rules("npu_kv_quant_sparse_flash_attention", "torch_npu-npu_kv_quant_sparse_flash_attention.md")
    modes = {"key_quant_mode": key_quant_mode, "value_quant_mode": value_quant_mode, "attention_mode": attention_mode}
    for name, mode in modes.items():
        rules.need(mode == 2, f"{name} is 2", mode)
    rules.need(quant_scale_repo_mode == 1, "quant_scale_repo_mode is 1", quant_scale_repo_mode)
    rules.need(tile_size == TILE, f"tile_size is {TILE}", tile_size)
    rules.need(rope_head_dim == ROPE, f"rope_head_dim is {ROPE}", rope_head_dim)
    rules.absent("reserved", key_dequant_scale=key_dequant_scale, value_dequant_scale=value_dequant_scale)
    rules.beyond(key.dtype is torch.uint8 or key_dtype is not None or value_dtype is not None, "hifloat8")
    sequences.check_layouts(rules, query, key, layout_query, layout_kv, "layout_kv")
    sequences.check_tokens(rules, pre_tokens, next_tokens, sparse_mode)
    rules.dtype("query", query, *HALF)
    rules.dtype("key", key, *((torch.int8, torch.float8_e4m3fn) if CHIP.is_950 else (torch.int8,)))
    rules.same_dtype(key=key, value=value)
    rules.need(value.shape[-2] == 1, "N of value is 1", value)
    rules.need(query.shape[-1] == NOPE + ROPE, f"D of query is {NOPE + ROPE}", query)
    rules.need(key.shape[-1] == ROW, f"D of key is {ROW}: 512 + 64·2 + 4·4", key)
    _heads(rules, query.shape[-2], sorted((*HEADS, 48)) if CHIP.is_950 else HEADS)
    _block_sparsity(rules, sparse_block_size, 16, key, layout_kv)
    rules.contiguous(query=query, sparse_indices=sparse_indices)
    _strides(rules, layout_kv, key=key)
    chosen = _selection(
        rules, query, key, sparse_indices, sparse_block_size, layout_query, layout_kv, sparse_mode,
        actual_seq_lengths_query, actual_seq_lengths_kv, block_table,
    )  # fmt: skip
    stored = sequences.flat(key, layout_kv)[:, 0]

    def gather(slot: Tensor) -> Tensor:
        row = stored[slot]
        scale = row[..., NOPE + 2 * ROPE :].contiguous().view(torch.float32).repeat_interleave(TILE, -1)
        nope = (row[..., :NOPE].float() * scale).to(query.dtype)
        rope = row[..., NOPE : NOPE + 2 * ROPE].contiguous().view(query.dtype)
        return torch.cat((nope, rope), -1).float()

    q = sequences.flat(query, layout_query)
    out, _, _ = _attend(q, gather, chosen, scale_value, None, rounded=True)
    return out.to(query.dtype).view(*query.shape[:-1], NOPE)


def _heads(rules: Rules, heads: int, allowed: range | tuple[int, ...] | list[int]) -> None:
    rules.need(heads in allowed, f"N of query is one of {allowed}", heads)


def _block_sparsity(rules: Rules, size: int, most: int, key: Tensor, layout: str) -> None:
    most = 1 if CHIP.is_950 else most
    power = size > 0 and size & (size - 1) == 0
    rules.need(power and size <= most, f"sparse_block_size is a power of two, at most {most}", size)
    if layout == "PA_BSND":
        rules.need(key.shape[1] % size == 0, f"sparse_block_size divides block_size {key.shape[1]}", size)


def _sinks(rules: Rules, sinks: Tensor | None, heads: int) -> None:
    if sinks is None:
        return
    rules.need(CHIP.is_950, "sinks are for Ascend950", sinks)
    rules.dtype("sinks", sinks, torch.float32)
    rules.shape("sinks", sinks, heads)


def _strides(rules: Rules, layout: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if CHIP.is_950 and layout == "PA_BSND":
            rules.need(tensor[0].is_contiguous(), f"{name} is contiguous in all axes but the first", tensor.stride())
        else:
            rules.contiguous(**{name: tensor})


def _same_data(key: Tensor, value: Tensor) -> bool:
    if key.data_ptr() == value.data_ptr():
        return True
    return torch.equal(key.view(torch.int16), value.view(torch.int16))  # bits: blocks not in use may hold NaN


def _selection(
    rules: Rules,
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    block: int,
    layout_query: str,
    layout_kv: str,
    sparse_mode: int,
    actual_query: Tensor | None,
    actual_kv: Tensor | None,
    block_table: Tensor | None,
) -> Selection:
    rules.dtype("sparse_indices", indices, torch.int32)
    rules.dims("sparse_indices", indices, query.dim())
    rules.need(indices.shape[:-2] == query.shape[:-2], "sparse_indices have query's rows", [query, indices])
    rules.need(indices.shape[-2] == 1 and indices.shape[-1] > 0, "sparse_indices are […, 1, sparse_size > 0]", indices)
    rows = sequences.queries(rules, query, layout_query, actual_query)
    where = sequences.keys(rules, key, layout_kv, actual_kv, block_table, len(rows.lengths), "actual_seq_lengths_kv")
    index = sequences.flat(indices, layout_query)[rows.row, 0].long()
    rules.need(bool((index >= -1).all()), "an index is a block or -1", int(index.min()) if index.numel() else 0)
    valid = index >= 0
    first = bool((valid[:, 1:] <= valid[:, :-1]).all())
    rules.need(first, "a row's valid indices come before its -1s", "a valid index after -1")
    length = where.lengths[rows.request][:, None]
    inside = index * block < length
    rules.need(bool(inside[valid].all()), "an index lies inside its request", index[valid & ~inside].tolist())
    position = (index[..., None] * block + torch.arange(block)).flatten(1)
    real = valid.repeat_interleave(block, 1) & (position < length)
    limit = length - rows.lengths[rows.request][:, None] + rows.offset[:, None]
    hidden = (position > limit) & (sparse_mode == 3)
    safe = torch.where(real, position, 0)
    slot = where.rows(rows.request[:, None].expand_as(safe), safe) if safe.numel() else safe
    return Selection(rows, torch.where(real, slot, 0), real, hidden)


def _attend(
    q: Tensor,
    gather: Callable[[Tensor], Tensor],
    chosen: Selection,
    scale: float,
    sinks: Tensor | None,
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, largest scores and sums of all query rows; padding rows keep zeros."""
    heads = q.shape[1]
    out = torch.zeros(len(q), heads, NOPE)
    largest, total = torch.full((len(q), heads), float("-inf")), torch.zeros(len(q), heads)
    step = max(1, CHUNK // (chosen.slot.shape[1] * (NOPE + ROPE)))
    for rows, slot, real, hidden in zip(
        *(part.split(step) for part in (chosen.rows.row, chosen.slot, chosen.real, chosen.hidden)), strict=True
    ):
        k = gather(slot)
        scores = torch.bmm(q[rows].float(), k.transpose(1, 2)) * scale
        scores = scores.masked_fill(hidden[:, None], HIDDEN).masked_fill(~real[:, None], float("-inf"))
        top = scores.amax(-1)
        if sinks is not None:
            top = torch.maximum(top, sinks)
        weight = torch.exp(scores - top.masked_fill(top.isneginf(), 0.0)[..., None])
        mass = weight.sum(-1)
        if sinks is not None:
            mass = mass + torch.exp(sinks - top)
        p = weight / mass.masked_fill(mass == 0, 1.0)[..., None]
        p = p.to(q.dtype).float() if rounded else p
        # Rows that are not selected may hold NaN, and 0·NaN is NaN.
        v = k[..., :NOPE].masked_fill(~real[..., None], 0.0)
        out[rows], largest[rows], total[rows] = torch.bmm(p, v), top, mass
    return out, largest, total


KERNELS = {
    "npu_sparse_flash_attention": sparse_flash_attention,
    "npu_kv_quant_sparse_flash_attention": kv_quant_sparse_flash_attention,
}
