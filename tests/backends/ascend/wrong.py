"""Wrong adapters: each is the right one with one mistake, where it calls the vendor's op or where it prepares for that.

A mistake is a function of the call's arguments by name; what it leaves alone stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .emulation import DENSE, HEADS, INDEXER, PROLOG, SPARSE

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Wrong:
    """``op`` at ``axes``, with ``change`` made to the arguments of ``calls``, or ``results`` to what that returns; or
    with ``parts`` of the backend's modules replaced, by "module.name"."""

    name: str
    op: str
    axes: dict[str, Any]
    calls: str = ""
    change: Callable[[Arguments], Arguments] = lambda given: {}
    results: Callable[[Any], Any] = lambda made: made
    parts: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    fill: str = "normal"

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def put(**values: Any) -> Callable[[Arguments], Arguments]:
    return lambda given: values


def swapped(a: str, b: str) -> Callable[[Arguments], Arguments]:
    return lambda given: {a: given[b], b: given[a]}


def made(name: str, change: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    return lambda given: {name: change(given[name])}


def other_columns(table: Tensor) -> Tensor:
    """A table's columns as the other layout has them."""
    return torch.cat([table[..., 0::2], table[..., 1::2]], -1)


# --- elementary ops and caches ---------------------------------------------------------------------------------------

ROPE = {"shape": (5, 3, 24), "layout": "interleaved"}
TURN = "npu_rotary_mul"
WRITE = {"T": 19, "L": 256, "R": 16, "N": 4, "page": 8, "format": "latent_576"}
SCATTER = "npu_scatter_nd_update_"


def _naive(parts: Any, slots: Tensor) -> None:
    for held, rows in parts:
        index = torch.stack([slots // held.shape[1], slots % held.shape[1]], -1)
        torch.ops.npu.npu_scatter_nd_update_(held, index, rows)


ELEMENTARY = (
    Wrong("cos and sin swapped", "rope", ROPE, TURN, swapped("r1", "r2")),
    Wrong("pairs half a head apart", "rope", ROPE, TURN, put(rotary_mode="half")),
    Wrong("mode forgotten", "rope", ROPE, TURN, lambda given: {"rotary_mode": "half"}),
    Wrong("columns of the other layout", "rope", ROPE, TURN, lambda g: {n: other_columns(g[n]) for n in ("r1", "r2")}),
    Wrong("tables in the storage dtype", "rope", ROPE, TURN,
          lambda g: {n: g[n].bfloat16().float() for n in ("r1", "r2")}, fill="exact"),
    Wrong("one table for all tokens", "rope", ROPE, TURN,
          lambda g: {n: g[n][:1].expand_as(g[n]) for n in ("r1", "r2")}),
    Wrong("up is activated", "silu_and_mul", {"shape": (5, 192)}, "npu_swiglu",
          made("input", lambda x: x.roll(96, -1))),
    Wrong("cut along the tokens", "silu_and_mul", {"shape": (6, 192)}, "npu_swiglu", put(dim=0)),
    Wrong("limit in bfloat16", "silu_and_mul", {"shape": (5, 192), "limit": 1.0037}, parts={
        "elementwise.swiglu": lambda rows, limit: torch.ops.npu.npu_swiglu(
            torch.cat([rows.chunk(2, -1)[0].clamp(max=limit), rows.chunk(2, -1)[1].clamp(-limit, limit)], -1), -1
        )}),
    Wrong("limit forgotten", "silu_and_mul", {"shape": (5, 192), "limit": 0.5}, parts={
        "elementwise.swiglu": lambda rows, limit: torch.ops.npu.npu_swiglu(rows, -1)}),
    Wrong("eps forgotten", "rms_norm", {"T": 4, "D": 96, "small": True, "eps": 3e-3}, "npu_rms_norm",
          put(epsilon=1e-6)),
    Wrong("a gain of one", "rms_norm", {"T": 4, "D": 96}, "npu_rms_norm", made("gamma", torch.ones_like)),
    Wrong("eps forgotten", "add_rms_norm", {"T": 4, "D": 96, "small": True, "eps": 3e-3}, "npu_add_rms_norm",
          put(epsilon=1e-6)),
    Wrong("residual not added", "add_rms_norm", {"T": 4, "D": 96}, "npu_add_rms_norm", made("x2", torch.zeros_like)),
    Wrong("the residual before the sum", "add_rms_norm", {"T": 4, "D": 96}, "npu_add_rms_norm",
          results=lambda made: (made[0], made[1], made[0])),
    Wrong("page and place swapped", "mla_cache_write", WRITE, SCATTER, made("indices", lambda at: at.flip(-1))),
    Wrong("the rope key before the latent", "mla_cache_write", WRITE, SCATTER,
          made("updates", lambda rows: rows.roll(16, -1))),
    Wrong("-1 passed on", "mla_cache_write", WRITE, parts={"caches.store": _naive}),
    Wrong("-1 passed on", "index_cache_write", {"T": 19, "D": 128, "N": 4, "page": 8, "format": "bf16_128"},
          parts={"caches.store": _naive}),
    Wrong("indices of a page only", "index_cache_write", {"T": 19, "D": 128, "N": 4, "page": 8, "format": "bf16_128"},
          SCATTER, made("indices", lambda at: at[:, :1])),
)  # fmt: skip

# --- the indexer and attention ---------------------------------------------------------------------------------------

CHOOSE, ATTEND, FUSED = "npu_lightning_indexer", "npu_sparse_flash_attention", "npu_fused_infer_attention_score_v2"
INDEX = {**INDEXER, "lens": ((3, 61), (2, 40))}
CHOSEN = {**SPARSE, "K": 7, "lens": ((2, 50), (1, 90))}
HOLES = {**SPARSE, "K": 60, "holes": True, "lens": ((2, 50), (1, 20))}
ALL = {**SPARSE, "lens": ((2, 50), (3, 90))}
CACHED = {**DENSE, "lens": ((3, 40), (2, 70))}
FULL = {**HEADS, "lens": ((5, 9), (4, 4))}


def with_zero(ends: Tensor) -> Tensor:
    return torch.cat([ends.new_zeros(1), ends])


def rope_first(given: Arguments) -> Arguments:
    joined = torch.cat([given["query"], given["query_rope"]], -1)
    return {"query": joined[..., 64:].contiguous(), "query_rope": joined[..., :64].contiguous()}


ATTENTION = (
    Wrong("ends with a leading 0", "lightning_indexer", INDEX, CHOOSE, made("actual_seq_lengths_query", with_zero)),
    Wrong("lengths in place of ends", "lightning_indexer", INDEX, CHOOSE,
          made("actual_seq_lengths_query", lambda ends: with_zero(ends).diff())),
    Wrong("ends of keys", "lightning_indexer", INDEX, CHOOSE,
          made("actual_seq_lengths_key", lambda lens: lens.cumsum(0).int())),
    Wrong("the mask forgotten", "lightning_indexer", INDEX, CHOOSE, put(sparse_mode=0)),
    Wrong("top_k forgotten", "lightning_indexer", INDEX, CHOOSE, put(sparse_count=2048)),
    Wrong("weights rounded", "lightning_indexer", {**INDEXER, "H": 1, "K": 512, "lens": ((4, 900),)}, CHOOSE,
          made("weights", lambda w: w.bfloat16().float() * 0 + w.bfloat16().float().abs())),
    Wrong("another layout of keys", "lightning_indexer", INDEX, CHOOSE, put(layout_key="BSND")),
    Wrong("indices in the way they come", "sparse_mla", HOLES, parts={
        "sparse.valid_first": lambda indices: indices}),
    Wrong("the scale missing", "sparse_mla", CHOSEN, ATTEND, put(scale_value=1.0)),
    Wrong("a logarithm to base 2", "sparse_mla", CHOSEN, ATTEND,
          results=lambda made: (made[0], made[1], made[2].log2().exp())),
    Wrong("the maximum left out of lse", "sparse_mla", CHOSEN, ATTEND,
          results=lambda made: (made[0], made[1] * 0, made[2])),
    Wrong("rope before latent", "sparse_mla", CHOSEN, ATTEND, rope_first),
    Wrong("no rope", "sparse_mla", CHOSEN, ATTEND, made("query_rope", torch.zeros_like)),
    Wrong("ends of keys with a leading 0", "sparse_mla", ALL, ATTEND, made("actual_seq_lengths_kv", with_zero)),
    Wrong("lengths of keys in place of ends", "sparse_mla", ALL, ATTEND,
          made("actual_seq_lengths_kv", lambda ends: with_zero(ends).diff())),
    Wrong("lse of paged keys", "sparse_mla", ALL, ATTEND, put(layout_kv="PA_BSND")),
    Wrong("the form with full heads", "sparse_mla", ALL, ATTEND, put(attention_mode=0)),
    Wrong("blocks of two keys", "sparse_mla", ALL, ATTEND, put(sparse_block_size=2)),
    Wrong("no lse", "sparse_mla", ALL, ATTEND, put(return_softmax_lse=False)),
    Wrong("indices of 64 bits", "sparse_mla", ALL, ATTEND, made("sparse_indices", lambda at: at.long())),
    Wrong("the mask forgotten", "mla_decode", CACHED, FUSED, put(sparse_mode=0, atten_mask=None)),
    Wrong("the mask turned", "mla_decode", CACHED, FUSED, made("atten_mask", lambda mask: mask.t().contiguous())),
    Wrong("aligned at the first key", "mla_decode", CACHED, FUSED, put(sparse_mode=2)),
    Wrong("a mask of these tokens alone", "mla_decode", CACHED, FUSED, made("atten_mask", lambda mask: mask[:3, :70])),
    Wrong("lengths in place of ends", "mla_decode", CACHED, FUSED, put(actual_seq_qlen=[3, 2])),
    Wrong("ends of paged keys", "mla_decode", CACHED, FUSED, put(actual_seq_kvlen=[40, 110])),
    Wrong("the scale missing", "mla_decode", CACHED, FUSED, put(softmax_scale=1.0)),
    Wrong("no lse", "mla_decode", CACHED, FUSED, put(return_softmax_lse=False)),
    Wrong("rope before latent", "mla_decode", CACHED, FUSED, rope_first),
    Wrong("as many heads of keys", "mla_decode", CACHED, FUSED, put(num_key_value_heads=4)),
    Wrong("a page of another size", "mla_decode", CACHED, FUSED, put(block_size=128)),
    Wrong("keys with gaps", "mla_decode", CACHED, FUSED,
          lambda g: {n: torch.cat([g["key"], g["key"]], -1)[..., :512] for n in ("key", "value")}),
    Wrong("the mask forgotten", "mla_prefill", FULL, FUSED, put(sparse_mode=0, atten_mask=None)),
    Wrong("lengths of keys in place of ends", "mla_prefill", FULL, FUSED, put(actual_seq_kvlen=[9, 4])),
    Wrong("heads forgotten", "mla_prefill", FULL, FUSED, put(num_query_heads=1)),
)  # fmt: skip

# --- experts ---------------------------------------------------------------------------------------------------------

ROUTE = {"T": 9, "E": 48, "top_k": 6, "routed_scaling_factor": 2.5}
GROUPS = {**ROUTE, "n_group": 6, "topk_group": 2}
SORT = {"T": 13, "K": 3, "D": 40, "E": 7, "elsewhere": 5}
PRODUCT = {"N": 24, "K": 40, "rows": (3, 0, 13, 1, 0)}
SPARE = {"N": 24, "K": 40, "rows": (0, 4, 2), "tail": 5}
SUM = {"T": 11, "K": 4, "D": 72, "elsewhere": 3, "spare": 6, "shared": True}
GATE, ROUTING, MATMUL = "npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_grouped_matmul"
FINAL = "npu_moe_finalize_routing"
FLOAT = {"dtype": "float32"}


def turned(rows: Tensor) -> Tensor:
    return rows.view(11, 4).t().reshape(-1)


EXPERTS = (
    Wrong("softmax", "moe_route", ROUTE, GATE, put(norm_type=0), **FLOAT),
    Wrong("the factor forgotten", "moe_route", ROUTE, GATE, put(routed_scaling_factor=1.0), **FLOAT),
    Wrong("the bias forgotten", "moe_route", ROUTE, GATE, put(bias=None), **FLOAT),
    Wrong("a group's best alone", "moe_route", GROUPS, GATE, put(group_select_mode=0), **FLOAT),
    Wrong("groups swapped", "moe_route", GROUPS, GATE, swapped("k_group", "group_count"), **FLOAT),
    Wrong("no groups", "moe_route", GROUPS, GATE, put(k_group=1, group_count=1), **FLOAT),
    Wrong("renormalised as no document has it", "moe_route", ROUTE, GATE, put(renorm=1), **FLOAT),
    Wrong("divided by the sum where softmax is not", "moe_route",
          {**ROUTE, "scoring_func": "softmax", "norm_topk_prob": False}, GATE,
          results=lambda made: (made[0] / made[0].sum(-1, keepdim=True) * 2.5, made[1], made[2]), **FLOAT),
    Wrong("the other kind of index", "moe_permute", SORT, ROUTING, put(row_idx_type=1)),
    Wrong("ends read as counts", "moe_permute", SORT, ROUTING, put(expert_tokens_num_type=0)),
    Wrong("-1 passed on", "moe_permute", SORT, ROUTING, made("expert_idx", lambda ids: ids.masked_fill(ids == 7, -1))),
    Wrong("rows of experts elsewhere too", "moe_permute", SORT, ROUTING, put(active_expert_range=[0, 8])),
    Wrong("all experts active by default", "moe_permute", SORT, ROUTING, put(active_expert_range=[])),
    Wrong("a row too few", "moe_permute", {**SORT, "elsewhere": 0}, ROUTING, put(active_num=38)),
    Wrong("counts forgotten", "moe_permute", SORT, ROUTING, put(expert_tokens_num_flag=False)),
    Wrong("counts for ends", "grouped_gemm", PRODUCT, MATMUL, put(group_list_type=1)),
    Wrong("ends of 32 bits", "grouped_gemm", PRODUCT, MATMUL, made("group_list", lambda ends: ends.int())),
    Wrong("ends with a leading 0", "grouped_gemm", PRODUCT, MATMUL, made("group_list", with_zero)),
    Wrong("rows that are nobody's", "grouped_gemm", SPARE, MATMUL, made("group_list", lambda ends: ends.clamp_max(6))),
    Wrong("weights as they lie", "grouped_gemm", PRODUCT, MATMUL,
          made("weight", lambda given: [given[0].transpose(1, 2)])),
    Wrong("as many results as weights", "grouped_gemm", PRODUCT, MATMUL, put(split_item=0)),
    Wrong("groups of columns", "grouped_gemm", PRODUCT, MATMUL, put(group_type=2)),
    Wrong("an activation", "grouped_gemm", PRODUCT, MATMUL, put(act_type=5)),
    Wrong("indices column by column", "moe_combine", SUM, FINAL, put(drop_pad_mode=1)),
    Wrong("no row left out", "moe_combine", SUM, FINAL, put(drop_pad_mode=2)),
    Wrong("indices in the other order", "moe_combine", SUM, FINAL, made("expanded_src_to_dst_row", turned)),
    Wrong("the shared part forgotten", "moe_combine", SUM, FINAL, put(skip1=None)),
    Wrong("weights left out", "moe_combine", SUM, FINAL, made("scales", torch.ones_like)),
    Wrong("weights of the rows' dtype", "moe_combine", {**SUM, "elsewhere": 0, "spare": 0}, FINAL,
          lambda g: {n: g[n].bfloat16() for n in ("expanded_permuted_rows", "skip1", "scales")}, fill="exact"),
    Wrong("the shared part in place of a second", "moe_combine", SUM, FINAL, swapped("skip1", "skip2")),
    Wrong("up is activated", "moe_experts", {"T": 13, "K": 3, "D": 64, "I": 40, "E": 7}, "npu_swiglu",
          made("input", lambda x: x.roll(40, -1))),
    Wrong("the other kind of index", "moe_experts", {"T": 13, "K": 3, "D": 64, "I": 40, "E": 7}, ROUTING,
          put(row_idx_type=1)),
)  # fmt: skip

# --- the prolog ------------------------------------------------------------------------------------------------------

FUSED_PROLOG = "npu_mla_prolog_v3"

PROLOGS = (
    Wrong("cos and sin in the usual order", "mla_prolog", PROLOG, FUSED_PROLOG, swapped("rope_sin", "rope_cos")),
    Wrong("weights not in FRACTAL_NZ", "mla_prolog", PROLOG, parts={"weights.in_nz": lambda w: w.t().contiguous().t()}),
    Wrong("pairs left half a head apart", "mla_prolog", PROLOG, parts={"prolog.side_by_side": lambda x: x}),
    Wrong("a table's columns side by side", "mla_prolog", PROLOG, FUSED_PROLOG,
          lambda g: {n: g[n][:, :32].repeat_interleave(2, -1) for n in ("rope_sin", "rope_cos")}),
    Wrong("the normed latent not asked for", "mla_prolog", PROLOG, FUSED_PROLOG, put(query_norm_flag=False)),
    Wrong("the caches swapped", "mla_prolog", PROLOG, FUSED_PROLOG, swapped("kv_cache", "kr_cache")),
    Wrong("eps forgotten", "mla_prolog", {**PROLOG, "size": 2.0**-9, "eps": 3e-4}, FUSED_PROLOG,
          put(rmsnorm_epsilon_cq=1e-5, rmsnorm_epsilon_ckv=1e-5)),
    Wrong("eps of the keys forgotten", "mla_prolog", {**PROLOG, "size": 2.0**-9, "eps": 3e-4}, FUSED_PROLOG,
          put(rmsnorm_epsilon_ckv=1e-5)),
    Wrong("places of 32 bits", "mla_prolog", PROLOG, FUSED_PROLOG, made("cache_index", lambda at: at.int())),
    Wrong("tables of float32", "mla_prolog", PROLOG, FUSED_PROLOG,
          lambda g: {n: g[n].float() for n in ("rope_sin", "rope_cos")}),
    Wrong("a factor on the queries", "mla_prolog", PROLOG, FUSED_PROLOG, put(qc_qr_scale=2.0)),
)  # fmt: skip

WRONG = (*ELEMENTARY, *ATTENTION, *EXPERTS, *PROLOGS)
