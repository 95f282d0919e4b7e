"""npu_moe_gating_top_k and npu_moe_init_routing_v2.

Gating works in float32; ties go to the lower index, and NaN ranks last, as golden code's stable sort of −x has it.
Sigmoid scores are renormalised and softmax scores are not. normOut has values only where out_flag is set.

Routing sorts stably by expert. Assumed where the documents are silent or leave outputs undefined: rows past the active
ones are poison, except that key-value counts end in zeros; a row of zeros quantises to zeros; counts are taken before
tokens are dropped (golden code). The page bounds expert_capacity by "less than NUM_ROWS" and its tests reach
NUM_ROWS; the page is followed. An empty active_expert_range is the whole range, as the page says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import quantize
from .constraints import Rules, poison
from .norms import FLOATS

QUANT_MODES = (-1, 0, 1, 2, 3, 6, 7, 8, 9, 11, 12, 13, 16, 17)


def gating_top_k(
    x: Tensor,
    k: int,
    bias: Tensor | None,
    input_ids: Tensor | None,
    tid2eid: Tensor | None,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rules = Rules("npu_moe_gating_top_k", "torch_npu-npu_moe_gating_top_k.md")
    rules.beyond(input_ids is not None or tid2eid is not None, "hash mode (input_ids, tid2eid)")
    rules.dims("x", x, 2)
    rules.dtype("x", x, *FLOATS)
    tokens, experts = x.shape
    rules.need(experts <= 2048, "x has at most 2048 experts", experts)
    if bias is not None:
        rules.shape("bias", bias, experts)
        rules.same_dtype(x=x, bias=bias)
    rules.need(group_count > 0 and experts % group_count == 0, f"group_count divides {experts} experts", group_count)
    size = experts // group_count
    rules.need(size > 2, "a group has more than 2 experts", size)
    rules.need(
        -(-size // 32) * 32 * group_count <= 2048, "groups, each rounded up to 32 experts, hold at most 2048", size
    )
    rules.need(1 <= k_group <= group_count, f"k_group is within [1, {group_count}]", k_group)
    rules.need(1 <= k <= size * k_group, f"k is within [1, {size * k_group}]", k)
    rules.one_of("group_select_mode", group_select_mode, (0, 1))
    rules.one_of("renorm", renorm, (0,))
    rules.one_of("norm_type", norm_type, (0, 1))
    scores = torch.sigmoid(x.float()) if norm_type else torch.softmax(x.float(), -1)
    ranked = scores if bias is None else scores + bias.float()
    if group_count > 1:
        groups = ranked.view(tokens, group_count, size)
        merit = groups.amax(-1) if group_select_mode == 0 else groups.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(merit, dtype=torch.bool).scatter_(1, _best(merit, k_group), True)
        ranked = groups.masked_fill(~kept[..., None], float("-inf")).view(tokens, experts)
    chosen = _best(ranked, k)
    y = scores.gather(1, chosen)
    if norm_type:
        y = y / (y.sum(-1, keepdim=True) + eps)
    normed = scores if out_flag else poison(tokens, experts, dtype=torch.float32)
    return (y * routed_scaling_factor).to(x.dtype), chosen.int(), normed


def _best(scores: Tensor, count: int) -> Tensor:
    return torch.argsort(-scores, dim=-1, stable=True)[:, :count]


def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: list[int],
    row_idx_type: int,
    x_dtype: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rules = Rules("npu_moe_init_routing_v2", "torch_npu-npu_moe_init_routing_v2.md")
    rules.dims("x", x, 2)
    rules.dims("expert_idx", expert_idx, 2)
    rules.dtype("x", x, *FLOATS, torch.int8)
    rules.dtype("expert_idx", expert_idx, torch.int32)
    rules.need(len(x) == len(expert_idx), "expert_idx has a row for each of x", [x, expert_idx])
    rules.one_of("drop_pad_mode", drop_pad_mode, (0, 1))
    rules.one_of("expert_tokens_num_type", expert_tokens_num_type, (0, 1, 2))
    rules.one_of("row_idx_type", row_idx_type, (0, 1))
    rules.one_of("quant_mode", quant_mode, QUANT_MODES)
    rules.beyond(quant_mode not in (-1, 0, 1) or x_dtype is not None, f"quant_mode {quant_mode}, x_dtype {x_dtype}")
    most = 5120 if expert_tokens_num_type == 2 else 10240
    rules.need(0 <= expert_num <= most, f"expert_num is within [0, {most}]", expert_num)
    rules.need(active_num >= -1, "active_num is at least -1", active_num)
    start, end = active_expert_range or (0, expert_num)
    rules.need(0 <= start < end <= expert_num, f"active_expert_range lies within [0, {expert_num}]", (start, end))
    known = bool(((expert_idx >= 0) & (expert_idx < expert_num)).all())
    rules.need(known, f"expert_idx are within [0, {expert_num})", expert_idx.tolist())
    _scales(rules, x, scale, offset, quant_mode, end - start)
    flat, top_k = expert_idx.flatten().long(), expert_idx.shape[1]
    active = (flat >= start) & (flat < end)
    order = torch.argsort(torch.where(active, flat, 2**31), stable=True)
    total = int(active.sum())
    counts = _counts(flat[active], start, end, expert_num, expert_tokens_num_type)
    if not expert_tokens_num_flag:
        counts = poison(*counts.shape, dtype=torch.int64)
    if drop_pad_mode == 1:
        rules.need(
            (start, end) == (0, expert_num), "active_expert_range is the whole range with drop_pad_mode 1", (start, end)
        )
        rules.need(0 < expert_capacity < len(x), f"expert_capacity is within (0, {len(x)})", expert_capacity)
        rules.beyond(quant_mode != -1 or row_idx_type != 0, "drop_pad_mode 1 with quantisation or scatter indices")
        return (
            *_padded(x, scale, flat, order, top_k, expert_num, expert_capacity),
            counts,
            _padded_scale(scale, flat, order, top_k, expert_num, expert_capacity),
        )
    rows = len(flat) if active_num <= 0 else min(active_num, len(flat))
    valid = min(rows, total)
    source, expert = order[:valid] // top_k, flat[order[:valid]] - start
    values, scales = _quantised(x[source], expert, None if scale is None else scale, offset, quant_mode, source)
    if row_idx_type:
        row_idx = torch.cat((order[:total].int(), poison(len(flat) - total, dtype=torch.int32)))
    else:
        row_idx = torch.full((len(flat),), -1, dtype=torch.int32)
        row_idx[order[:total]] = torch.arange(total, dtype=torch.int32)
    expanded = torch.cat((values, poison(rows - valid, x.shape[1], dtype=values.dtype)))
    expanded_scale = torch.cat((scales, poison(rows - valid, dtype=torch.float32)))
    return expanded, row_idx, counts, expanded_scale


def _counts(expert: Tensor, start: int, end: int, expert_num: int, kind: int) -> Tensor:
    counts = torch.bincount(expert - start, minlength=end - start)
    if kind == 0:
        return counts.cumsum(0)
    if kind == 1:
        return counts
    used = counts.nonzero()[:, 0]
    pairs = torch.zeros(expert_num, 2, dtype=torch.int64)
    pairs[: len(used)] = torch.stack((used + start, counts[used]), 1)
    return pairs


def _quantised(
    rows: Tensor, expert: Tensor, scale: Tensor | None, offset: Tensor | None, quant_mode: int, source: Tensor
) -> tuple[Tensor, Tensor]:
    none = poison(len(rows), dtype=torch.float32)
    if quant_mode == -1:
        return rows, none if scale is None else scale[source]
    if quant_mode == 0:
        assert scale is not None
        assert offset is not None
        return quantize.int8((rows.half() * scale.half() + offset.half()).float()), none
    smooth = rows.float()
    if scale is not None and len(rows):
        smooth = smooth * (scale if len(scale) == 1 else scale[expert])
    values, scales = quantize.per_row(smooth)
    return values, scales[:, 0]


def _scales(
    rules: Rules, x: Tensor, scale: Tensor | None, offset: Tensor | None, quant_mode: int, experts: int
) -> None:
    for name, tensor in {"scale": scale, "offset": offset}.items():
        if tensor is not None:
            rules.dtype(name, tensor, torch.float32)
    if quant_mode == 0:
        rules.given("quant_mode is 0", scale=scale, offset=offset)
        assert scale is not None
        assert offset is not None
        rules.shape("scale", scale, 1)
        rules.shape("offset", offset, 1)
        return
    rules.absent(f"quant_mode is {quant_mode}", offset=offset)
    if scale is None or not len(x):
        return  # without tokens the op returns before it looks
    if quant_mode == -1:
        rules.shape("scale", scale, len(x))
    else:
        allowed = [(experts, x.shape[1]), (1, x.shape[1])]
        rules.need(tuple(scale.shape) in allowed, f"scale has one of the shapes {allowed}", scale)


def _places(flat: Tensor, order: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Which (token, expert) pairs are kept, and the padded row of each."""
    expert = flat[order]
    first = torch.searchsorted(expert, expert)
    rank = torch.arange(len(order)) - first
    kept = rank < capacity
    return order[kept], (expert * capacity + rank)[kept]


def _padded(
    x: Tensor, scale: Tensor | None, flat: Tensor, order: Tensor, top_k: int, experts: int, capacity: int
) -> tuple[Tensor, Tensor]:
    pair, place = _places(flat, order, capacity)
    expanded = x.new_zeros(experts * capacity, x.shape[1])
    expanded[place] = x[pair // top_k]
    row_idx = torch.full((len(flat),), -1, dtype=torch.int32)
    row_idx[pair] = place.int()
    return expanded.view(experts, capacity, -1), row_idx


def _padded_scale(scale: Tensor | None, flat: Tensor, order: Tensor, top_k: int, experts: int, capacity: int) -> Tensor:
    if scale is None:
        return poison(experts * capacity, dtype=torch.float32)
    pair, place = _places(flat, order, capacity)
    padded = torch.zeros(experts * capacity)
    padded[place] = scale[pair // top_k]
    return padded


KERNELS = {"npu_moe_gating_top_k": gating_top_k, "npu_moe_init_routing_v2": init_routing_v2}
