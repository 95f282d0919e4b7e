"""npu_fused_infer_attention_score and npu_fused_infer_attention_score_v2, without quantisation.

Scores and softmax are in float32; probabilities are rounded to query's dtype before they meet the values, as golden
code does, and the sum of that product is rounded once. lse is natural. Outputs without keys are zeros (the pages say so
for S2 = 0; one request without keys among others and a row whose mask hides every key are assumed to be the same, and
to have lse −inf), and so are rows past a request's length. A request without tokens, whose prefix sum may equal its
predecessor, has no output rows. Without lse its tensor is empty, as the op's shape inference has it, though the pages
say [1].

Not emulated: quantised inputs and outputs, pse_shift, shared prefixes, left padding, sparse modes 4 and 9.
The constraints are in :mod:`.attention_rules`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .attention_rules import Attention, check, check_unpaged_lengths, page_lengths
from .constraints import Rules

LEFT_OUT = (
    "pse_shift", "dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2", "quant_offset2",
    "antiquant_scale", "antiquant_offset", "key_antiquant_scale", "key_antiquant_offset", "value_antiquant_scale",
    "value_antiquant_offset", "query_padding_size", "kv_padding_size", "key_shared_prefix", "value_shared_prefix",
    "actual_shared_prefix_len", "dequant_scale_query", "dequant_scale_key", "dequant_offset_key",
    "dequant_scale_value", "dequant_offset_value", "quant_scale_out", "quant_offset_out", "out_dtype",
)  # fmt: skip
#: Arguments that both versions call the same.
SAME = (
    "query", "key", "value", "query_rope", "key_rope", "block_table", "pre_tokens", "next_tokens", "sparse_mode",
    "block_size", "inner_precise",
)  # fmt: skip
#: "reserved, not used yet: the default will do"
RESERVED = ("key_rope_antiquant_scale", "dequant_scale_key_rope", "quant_scale_p")


def fused_infer_attention_score(**given: Any) -> tuple[Tensor, Tensor]:
    rules = Rules("npu_fused_infer_attention_score", "torch_npu-npu_fused_infer_attention_score.md")
    return _attention(
        rules,
        given,
        query_lengths=given["actual_seq_lengths"],
        key_lengths=given["actual_seq_lengths_kv"],
        sink=None,
        heads=given["num_heads"],
        scale=given["scale"],
        lse=given["softmax_lse_flag"],
    )


def fused_infer_attention_score_v2(**given: Any) -> tuple[Tensor, Tensor]:
    rules = Rules("npu_fused_infer_attention_score_v2", "torch_npu-npu_fused_infer_attention_score_v2.md")
    return _attention(
        rules,
        given,
        query_lengths=given["actual_seq_qlen"],
        key_lengths=given["actual_seq_kvlen"],
        sink=given["learnable_sink"],
        heads=given["num_query_heads"],
        scale=given["softmax_scale"],
        lse=given["return_softmax_lse"],
    )


def _attention(rules: Rules, given: dict[str, Any], **words: Any) -> tuple[Tensor, Tensor]:
    asked = [name for name in LEFT_OUT if given.get(name) is not None]
    rules.beyond(bool(asked), ", ".join(asked))
    rules.absent("reserved", **{name: given[name] for name in RESERVED if name in given})
    reserved = [name for name in given if name.endswith("_dtype") and name != "out_dtype"]
    rules.absent("reserved", **{name: given[name] for name in reserved})
    call = Attention(
        **{name: given[name] for name in SAME},
        **words,
        key_heads=given["num_key_value_heads"] or words["heads"],
        layout=given["input_layout"],
        mask=given["atten_mask"],
    )
    check(rules, call)
    return _compute(rules, call)


def _compute(rules: Rules, call: Attention) -> tuple[Tensor, Tensor]:
    queries = _queries(call, call.query, call.width)
    if call.query_rope is not None:
        ropes = _queries(call, call.query_rope, 64)
        queries = [torch.cat(pair, -1) for pair in zip(queries, ropes, strict=True)]
    keys, values = _keys(rules, call, queries)
    wide = values[0].shape[-1]
    outs, lses = [], []
    for request, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        out, lse = _attend(call, q, k, v, _visible(rules, call, request, q.shape[1], k.shape[1]))
        outs.append(out)
        lses.append(lse)
    if call.tokens:
        out, lse = torch.cat(outs, 1), torch.cat(lses, 1)  # N, T, D
        shaped = out if call.layouts[1] == "NTD" else out.transpose(0, 1)
        lse = lse.transpose(0, 1)
    else:
        rows = call.query_rows
        out = torch.stack([_padded(part, rows) for part in outs])  # B, N, S, D
        lse = torch.stack([_padded(part, rows, float("-inf")) for part in lses])
        shaped = {
            "BNSD": lambda: out,
            "BSND": lambda: out.transpose(1, 2),
            "BSH": lambda: out.transpose(1, 2).reshape(call.batch, rows, call.heads * wide),
            "NBSD": lambda: out.transpose(0, 1),
        }[call.layouts[1]]()
    return shaped.to(call.query.dtype).contiguous(), lse.contiguous() if call.lse else torch.empty(0)


def _queries(call: Attention, tensor: Tensor, width: int) -> list[Tensor]:
    """Every request's queries as [N, S, D], without padding."""
    layout = call.layouts[0]
    if call.tokens:
        by_head = tensor.transpose(0, 1) if layout == "TND" else tensor
        ends = list(call.query_lengths or ())
        return [by_head[:, a:b] for a, b in zip([0, *ends], ends, strict=False)]
    by_head = _by_head(tensor, layout, call.heads, width)
    if call.query_lengths is None or call.query_rows == 1:
        return list(by_head)
    lengths = list(call.query_lengths)
    lengths = lengths * call.batch if len(lengths) == 1 else lengths
    return [rows[:, :length] for rows, length in zip(by_head, lengths, strict=False)]


def _by_head(tensor: Tensor, layout: str, heads: int, width: int) -> Tensor:
    if layout == "BSH":
        tensor = tensor.view(*tensor.shape[:2], heads, width)
    return tensor if layout == "BNSD" else tensor.transpose(1, 2)


def _keys(rules: Rules, call: Attention, queries: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Every request's keys, rope included, and values as [N, S, D]."""
    take = _pages_of if call.block_table is not None else _rows_of
    keys = take(rules, call, "key", call.key, queries[0].shape[-1] - (64 if call.key_rope is not None else 0))
    values = take(rules, call, "value", call.value, None)
    if call.key_rope is not None:
        ropes = take(rules, call, "key_rope", call.key_rope, 64)
        keys = [torch.cat(pair, -1) for pair in zip(keys, ropes, strict=True)]
    return keys, values


def _rows_of(rules: Rules, call: Attention, name: str, tensor: Tensor, width: int | None) -> list[Tensor]:
    layout, heads = call.layouts[0], call.key_heads
    rules.dims(name, tensor, 4 if layout in ("BSND", "BNSD") else 3)
    axis = {"BSND": 2, "BNSD": 1, "TND": 1, "NTD": 0}.get(layout)
    if axis is None:
        width = tensor.shape[-1] // heads if width is None else width
        rules.need(tensor.shape[-1] == heads * width, f"H of {name} is {heads} heads of {width}", tensor)
    else:
        rules.need(tensor.shape[axis] == heads, f"{name} has {heads} heads", tensor)
        rules.need(width in (None, tensor.shape[-1]), f"D of {name} is {width}", tensor)
    if call.tokens:
        by_head = tensor.transpose(0, 1) if layout == "TND" else tensor
        check_unpaged_lengths(rules, call, by_head.shape[1])
        ends = list(call.key_lengths or ())
        return [by_head[:, a:b] for a, b in zip([0, *ends], ends, strict=False)]
    rules.need(len(tensor) == call.batch, f"B of {name} is {call.batch}", tensor)
    by_head = _by_head(tensor, layout, heads, width or 0)
    check_unpaged_lengths(rules, call, by_head.shape[2])
    if call.key_lengths is None:
        return list(by_head)
    return [rows[:, :length] for rows, length in zip(by_head, page_lengths(call), strict=True)]


def _pages_of(rules: Rules, call: Attention, name: str, tensor: Tensor, width: int | None) -> list[Tensor]:
    assert call.block_table is not None
    heads, size = call.key_heads, call.block_size
    if tensor.dim() == 3:
        pages = tensor.view(len(tensor), size, heads, -1).transpose(1, 2)
    else:
        pages = tensor if tensor.dim() == 4 else tensor.transpose(2, 3).flatten(3)  # FRACTAL_NZ: columns by 16
    taken = []
    for row, length in zip(call.block_table, page_lengths(call), strict=True):
        blocks = pages[row[: math.ceil(length / size)].long()]
        taken.append(blocks.transpose(0, 1).flatten(1, 2)[:, :length])
    return taken


def _visible(rules: Rules, call: Attention, request: int, rows: int, columns: int) -> Tensor | None:
    """Which keys each query sees, or None for all."""
    mode = call.sparse_mode
    if call.query_rows == 1 and call.query_rope is None and not call.tokens:
        mode = 0 if mode not in (0, 1) else mode
        if call.mask is not None and call.mask.shape[-2:] == (2048, 2048):
            return None
    if mode in (2, 3):
        behind = columns - rows if mode == 3 else 0
        return torch.arange(columns) <= torch.arange(rows)[:, None] + behind
    if call.mask is None:
        return None
    mask = call.mask
    if mask.dim() == 2:
        plain = call.query_rope is None and call.layout in ("BSH", "BSND", "BNSD", "BNSD_BSND")
        rules.need(plain, "an atten_mask of 2 dims is for BSH, BSND, BNSD and BNSD_BSND without rope", mask)
        mask = mask[:, None] if call.query_rows == 1 else mask[None]
    elif mask.dim() == 4:
        rules.need(mask.shape[1] == 1, "an atten_mask of 4 dims is [B or 1, 1, S, S2]", mask)
        mask = mask[:, 0]
    rules.dims("atten_mask", mask, 3)
    rules.need(len(mask) in (1, call.batch), "atten_mask has 1 row of batches or B", call.mask)
    paged = call.block_table is not None
    least = call.block_table.shape[1] * call.block_size if paged and call.block_table is not None else columns
    fits = call.query_rows <= mask.shape[1] <= math.ceil(call.query_rows / 32) * 32 and mask.shape[2] >= least
    rules.need(fits, f"atten_mask covers {call.query_rows} queries and {least} keys", call.mask)
    return mask[request % len(mask), :rows, :columns] == 0


def _attend(call: Attention, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    group = call.heads // call.key_heads
    rows, columns = q.shape[1], k.shape[1]
    if not columns:
        return torch.zeros(call.heads, rows, v.shape[-1]), torch.full((call.heads, rows, 1), float("-inf"))
    grouped = q.float().reshape(call.key_heads, group * rows, q.shape[-1])
    scores = (grouped @ k.float().transpose(1, 2)).view(call.heads, rows, columns) * call.scale
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if call.sink is not None:
        scores = torch.cat((scores, call.sink.float()[:, None, None].expand(-1, rows, 1)), -1)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    p = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0))[..., :columns].to(call.query.dtype).float()
    out = p.reshape(call.key_heads, group * rows, columns) @ v.float()
    return out.view(call.heads, rows, v.shape[-1]), lse


def _padded(rows: Tensor, length: int, value: float = 0.0) -> Tensor:
    missing = length - rows.shape[1]
    return rows if not missing else torch.nn.functional.pad(rows, (0, 0, 0, missing), value=value)


KERNELS = {
    "npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu_fused_infer_attention_score_v2": fused_infer_attention_score_v2,
}
