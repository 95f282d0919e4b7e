"""npu_scatter_nd_update_ and npu_kv_rmsnorm_rope_cache: both write where their schema or page says, and only there.

npu_kv_rmsnorm_rope_cache writes its caches although its schema does not mark them, as its page says. A negative index
leaves its token out, as in golden code; outputs k_embed and y exist always and mean something only where is_output_kv
holds and the cache is paged. A duplicate index is undefined there and refused. npu_scatter_nd_update_'s page is silent
about duplicates, and its example has some: they are refused where they would write different bits, since nothing
says which one wins. The page speaks of a last cache axis of 32 in quantised FRACTAL_NZ and gives another shape in its
table; the table and golden code are followed. Argument v belongs to no page and is not emulated. Norm mode has no
golden code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import quantize
from .constraints import Rules, poison
from .norms import HALF, rms
from .rope import deinterleaved, rotate_half

SCATTERED = (torch.float32, torch.float16, torch.bool, torch.bfloat16, torch.int64, torch.int8)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PAGED = ("PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ")
NOPE, ROPE = 512, 64


def scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    rules = Rules("npu_scatter_nd_update_", "torch_npu-npu_scatter_nd_update_.md")
    rules.dims("input", input, 1, 8)
    rules.dtype("input", input, *SCATTERED)
    rules.same_dtype(input=input, updates=updates)
    rules.dtype("indices", indices, torch.int32, torch.int64)
    rules.need(indices.dim() >= 2, "indices have at least 2 dims", indices)
    depth = indices.shape[-1]
    rules.need(1 <= depth <= input.dim(), "the last dim of indices is at most input's dims", indices)
    rules.shape("updates", updates, *indices.shape[:-1], *input.shape[depth:])
    index = indices.reshape(-1, depth).long()
    bounds = torch.tensor(input.shape[:depth])
    outside = ((index < 0) | (index >= bounds)).any(1)
    rules.need(not outside.any(), f"indices are within {bounds.tolist()}", index[outside].tolist())
    values = updates.reshape(len(index), *input.shape[depth:])
    _one_writer(rules, index, values)
    return input.index_put_(tuple(index.T), values)


def _one_writer(rules: Rules, index: Tensor, values: Tensor) -> None:
    unique, which = index.unique(dim=0, return_inverse=True)
    if len(unique) == len(index):
        return
    first = torch.full((len(unique),), len(index)).scatter_reduce_(0, which, torch.arange(len(index)), "amin")
    bits = values.view(BITS[values.itemsize])  # as numbers a NaN would differ from itself, and 0.0 not from -0.0
    differs = bits != bits[first[which]]
    rules.need(not differs.any(), "indices that occur twice write the same values, bit for bit", index.tolist())


def kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    k_rope_scale: Tensor | None,
    c_kv_scale: Tensor | None,
    k_rope_offset: Tensor | None,
    c_kv_offset: Tensor | None,
    v: Tensor | None,
    epsilon: float,
    cache_mode: str,
    is_output_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rules = Rules("npu_kv_rmsnorm_rope_cache", "torch_npu-npu_kv_rmsnorm_rope_cache.md")
    rules.beyond(v is not None, "argument v")
    rules.one_of("cache_mode", cache_mode, ("Norm", *PAGED))
    rules.dims("kv", kv, 4)
    batch, _, length, _ = kv.shape
    rules.shape("kv", kv, batch, 1, length, NOPE + ROPE)
    rules.dtype("kv", kv, *HALF)
    rules.shape("gamma", gamma, NOPE)
    rules.shape("cos", cos, batch, 1, length, ROPE)
    rules.shape("sin", sin, batch, 1, length, ROPE)
    for name, tensor in {"gamma": gamma, "cos": cos, "sin": sin}.items():
        rules.dtype(name, tensor, *HALF)
    rules.absent("not supported yet", k_rope_offset=k_rope_offset, c_kv_offset=c_kv_offset)
    quantised = _quantised(rules, k_rope_scale, c_kv_scale)
    for name, cache, width in (("k_cache", k_cache, ROPE), ("ckv_cache", ckv_cache, NOPE)):
        rules.dims(name, cache, 4)
        rules.dtype(name, cache, *((torch.int8,) if quantised else HALF))
        rules.need(cache.shape[-1] == width, f"the last dim of {name} is {width}", cache)
    rules.need(k_cache.shape[:-1] == ckv_cache.shape[:-1], "both caches have the same slots", [k_cache, ckv_cache])
    slots, written = _slots(rules, index, k_cache, cache_mode, batch, length)
    paged = cache_mode in PAGED
    normed, _ = rms(kv[..., :NOPE], gamma, epsilon)
    pairs = deinterleaved(kv[..., NOPE:].float())
    embedded = pairs * cos.float() + rotate_half(pairs) * sin.float()
    group = (32 if quantised else 16) if cache_mode.endswith("NZ") else 0
    for cache, rows, scale in ((k_cache, embedded, k_rope_scale), (ckv_cache, normed, c_kv_scale)):
        stored = rows.to(cache.dtype) if scale is None else quantize.int8(rows * scale)
        pages = cache if paged else cache.transpose(1, 2)  # in Norm mode every batch is a page
        write(pages, slots[written], stored.reshape(batch * length, -1)[written], group)
    if is_output_kv and paged:
        return k_cache, ckv_cache, embedded.to(kv.dtype), normed.to(kv.dtype)
    undefined = [poison(batch, 1, length, width, dtype=kv.dtype) for width in (ROPE, NOPE)]
    return k_cache, ckv_cache, undefined[0], undefined[1]


def write(cache: Tensor, slots: Tensor, rows: Tensor, group: int = 0) -> None:
    """Rows to slots of a cache [blocks, block_size, 1, D]; ``group`` columns lie together in a FRACTAL_NZ page."""
    blocks, size, _, width = cache.shape
    if not group:
        cache[slots // size, slots % size, 0] = rows
        return
    pages = cache.view(blocks, width // group, size, group)
    pages[slots // size, :, slots % size] = rows.view(len(rows), width // group, group)


def _quantised(rules: Rules, k_rope_scale: Tensor | None, c_kv_scale: Tensor | None) -> bool:
    both = (k_rope_scale is None) == (c_kv_scale is None)
    rules.need(both, "k_rope_scale and c_kv_scale are given together", [k_rope_scale, c_kv_scale])
    for name, scale, width in (("k_rope_scale", k_rope_scale, ROPE), ("c_kv_scale", c_kv_scale, NOPE)):
        if scale is not None:
            rules.dtype(name, scale, torch.float32)
            rules.shape(name, scale, width)
    return k_rope_scale is not None


def _slots(rules: Rules, index: Tensor, cache: Tensor, mode: str, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The slot of every token, and which tokens are written."""
    rules.dtype("index", index, torch.int64)
    if mode == "Norm":
        rules.need(
            tuple(cache.shape[:2]) == (batch, 1), "caches of Norm mode are [batch_size, 1, cache_length, D]", cache
        )
        size = cache.shape[2]
        rules.need(size >= length, f"cache_length is at least seq_len {length}", size)
        rules.shape("index", index, batch, length)
        _distinct(rules, index, size, per_row=True)
        slots = (torch.arange(batch)[:, None] * size + index).flatten()
        return slots, index.flatten() >= 0
    blocks, size = cache.shape[:2]
    rules.need(cache.shape[2] == 1, "caches of paged modes are [block_num, block_size, 1, D]", cache)
    pages = math.ceil(length / size)
    rules.need(
        blocks >= pages * batch,
        f"block_num is at least ceil(seq_len / block_size) · batch_size = {pages * batch}",
        blocks,
    )
    if "BLK" not in mode:
        rules.shape("index", index, batch * length)
        _distinct(rules, index[None], blocks * size, per_row=False)
        return index, index >= 0
    rules.shape("index", index, batch * pages)
    _distinct(rules, index[None], blocks * size, per_row=False)
    token = torch.arange(length)
    start = index.view(batch, pages)[:, token // size]
    slots = torch.div(start, size, rounding_mode="floor") * size + token % size
    return slots.flatten(), start.flatten() >= 0


def _distinct(rules: Rules, index: Tensor, bound: int, per_row: bool) -> None:
    rules.need(bool((index < bound).all()), f"index is below {bound}", index.tolist())
    for row in index.tolist():
        used = [slot for slot in row if slot >= 0]
        where = "within its batch" if per_row else ""
        rules.need(len(set(used)) == len(used), f"index has no duplicates {where}".rstrip(), row)


KERNELS = {"npu_scatter_nd_update_": scatter_nd_update_, "npu_kv_rmsnorm_rope_cache": kv_rmsnorm_rope_cache}
