"""npu_moe_finalize_routing, npu_moe_token_permute, npu_moe_token_unpermute.

npu_moe_finalize_routing sums in float32, in the order of k, and rounds once; its golden code is numpy in float32. A
dropped row (−1) adds nothing but its expert's bias, as in golden code. The page names two rows orders: modes 0 and 1
read index k·rows + i, modes 2 and 3 read i·K + k. Without scales K is the argument `k`.

The other two have no page in the documents that were read, only golden code: sorting is stable; sorted_indices say
where each (token, expert) pair went; products are rounded to the dtype of their factors before a float32 sum. Assumed:
num_out_tokens None and 0 keep all pairs and a negative one drops that many (shape inference of the op); unpermute
takes a pair that was dropped as zeros; padded_mode is not emulated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constraints import Rules
from .norms import FLOATS


def finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None,
    k: int | None,
) -> Tensor:
    rules = Rules("npu_moe_finalize_routing", "torch_npu-npu_moe_finalize_routing.md")
    mode = 0 if drop_pad_mode is None else drop_pad_mode
    rules.one_of("drop_pad_mode", mode, (0, 1, 2, 3))
    dropping, by_row = mode in (1, 3), mode in (2, 3)
    rows = expanded_permuted_rows
    rules.dtype("expanded_permuted_rows", rows, *FLOATS)
    rules.dims("expanded_permuted_rows", rows, 3 if dropping else 2)
    given = {"skip1": skip1, "skip2": skip2, "bias": bias, "scales": scales}
    for name, tensor in given.items():
        rules.same_dtype(expanded_permuted_rows=rows, **{name: tensor})
    rules.need(skip1 is not None or skip2 is None, "skip2 is None where skip1 is", skip2)
    index = expanded_src_to_dst_row
    rules.dtype("expanded_src_to_dst_row", index, torch.int32)
    rules.dims("expanded_src_to_dst_row", index, 1)
    if scales is not None:
        rules.dims("scales", scales, 2)
    top_k = scales.shape[1] if scales is not None else (k or 1)
    rules.need(top_k >= 1 and len(index) % top_k == 0, f"expanded_src_to_dst_row has a multiple of K = {top_k}", index)
    tokens, width = len(index) // top_k, rows.shape[-1]
    if scales is not None:
        rules.shape("scales", scales, tokens, top_k)
    if not dropping:
        rules.shape("expanded_permuted_rows", rows, tokens * top_k, width)
    for name, skip in {"skip1": skip1, "skip2": skip2}.items():
        if skip is not None:
            rules.shape(name, skip, tokens, width)
    flat = rows.reshape(-1, width).float()
    least = -1 if dropping else 0
    inside = bool(((index >= least) & (index < len(flat))).all())
    rules.need(inside, f"expanded_src_to_dst_row is within [{least}, {len(flat) - 1}]", index.tolist())
    expert = _experts(rules, rows, bias, export_for_source_row, tokens, top_k, dropping)
    place = (index.view(tokens, top_k) if by_row else index.view(top_k, tokens).T).long()
    out = sum((skip.float() for skip in (skip1, skip2) if skip is not None), torch.zeros(tokens, width))
    for column in range(top_k):
        slot = place[:, column]
        row = flat[slot.clamp(min=0)].masked_fill((slot < 0)[:, None], 0.0)
        if bias is not None:
            assert expert is not None
            row = row + bias.float()[expert[:, column].long()]
        out = out + (row if scales is None else scales[:, column, None].float() * row)
    return out.to(rows.dtype)


def _experts(
    rules: Rules, rows: Tensor, bias: Tensor | None, expert: Tensor | None, tokens: int, top_k: int, dropping: bool
) -> Tensor | None:
    if bias is None:
        return None
    rules.dims("bias", bias, 2)
    rules.need(bias.shape[1] == rows.shape[-1], "bias is [E, H]", bias)
    if dropping:
        rules.need(len(bias) == len(rows), "bias has a row for each expert", [bias, rows])
    rules.given("bias is given", export_for_source_row=expert)
    assert expert is not None
    rules.dtype("export_for_source_row", expert, torch.int32)
    rules.shape("export_for_source_row", expert, tokens, top_k)
    known = bool(((expert >= 0) & (expert < len(bias))).all())
    rules.need(known, f"export_for_source_row is within [0, {len(bias) - 1}]", expert.tolist())
    return expert


NO_PAGE = "(no page: golden code test_npu_moe_token_permute_and_unpermute.py)"


def token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[Tensor, Tensor]:
    rules = Rules("npu_moe_token_permute", NO_PAGE)
    rules.beyond(padded_mode, "padded_mode")
    rules.dims("tokens", tokens, 2)
    rules.dtype("tokens", tokens, *FLOATS)
    rules.dims("indices", indices, 1, 2)
    rules.dtype("indices", indices, torch.int32, torch.int64)
    rules.need(len(indices) == len(tokens), "indices have a row for each token", [tokens, indices])
    top_k = 1 if indices.dim() == 1 else indices.shape[1]
    order = torch.argsort(indices.flatten(), stable=True)
    asked = num_out_tokens or 0
    kept = min(asked, len(order)) if asked > 0 else max(len(order) + asked, 0)
    return tokens[order[:kept] // top_k], torch.argsort(order).int()


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None,
    padded_mode: bool,
    restore_shape: list[int] | None,
) -> Tensor:
    rules = Rules("npu_moe_token_unpermute", NO_PAGE)
    rules.beyond(padded_mode or restore_shape is not None, "padded_mode and restore_shape")
    rules.dims("permuted_tokens", permuted_tokens, 2)
    rules.dtype("permuted_tokens", permuted_tokens, *FLOATS)
    rules.dims("sorted_indices", sorted_indices, 1)
    rules.dtype("sorted_indices", sorted_indices, torch.int32)
    rules.need(not (sorted_indices < 0).any(), "sorted_indices are not negative", sorted_indices.tolist())
    rows = len(permuted_tokens)
    dropped = sorted_indices >= rows
    taken = permuted_tokens[sorted_indices.clamp(max=max(rows - 1, 0))].masked_fill(dropped[:, None], 0)
    if probs is None:
        return taken
    rules.dims("probs", probs, 2)
    rules.need(
        probs.dtype in (permuted_tokens.dtype, torch.float32), "probs have permuted_tokens' dtype or float32", probs
    )
    rules.need(probs.numel() == len(sorted_indices), "probs have a value for each index", [probs, sorted_indices])
    weighted = taken.view(*probs.shape, -1) * probs[..., None]
    return weighted.float().sum(1).to(permuted_tokens.dtype)


KERNELS = {
    "npu_moe_finalize_routing": finalize_routing,
    "npu_moe_token_permute": token_permute,
    "npu_moe_token_unpermute": token_unpermute,
}
