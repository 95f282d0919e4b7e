"""Small valid calls of every emulated op, by name: what tests bend, and what is held against torch_npu's own shapes.

`SAMPLES[op]` maps a case's name to a function that makes the arguments; `sample(op, case)` makes them from one seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import attention_samples as attention
from .attention_samples import BF16, Arguments, angles, int8, ints, rand


def sample(op: str, case: str = "plain", seed: int = 0) -> Arguments:
    torch.manual_seed(seed)
    return SAMPLES[op][case]()


def interleave_rope() -> Arguments:
    cos, sin = angles(2, 1, 5, 64)
    return {"x": rand(2, 4, 5, 64), "cos": cos, "sin": sin}


def rotary_mul(
    x: tuple[int, ...] = (2, 5, 4, 128), r: tuple[int, ...] = (1, 5, 1, 128), mode: str = "half"
) -> Arguments:
    cos, sin = angles(*r)
    return {"input": rand(*x), "r1": cos, "r2": sin, "rotary_mode": mode}


def kv_rmsnorm_rope_cache(mode: str = "PA_BNSD") -> Arguments:
    cos, sin = angles(2, 1, 3, 64)
    shape = (2, 1, 8) if mode == "Norm" else (4, 8, 1)
    index = torch.tensor([[0, 3, 7], [1, 2, 4]]) if mode == "Norm" else torch.tensor([5, 17, 2, 31, 8, 9])
    return {
        "kv": rand(2, 1, 3, 576),
        "gamma": rand(512),
        "cos": cos,
        "sin": sin,
        "index": torch.tensor([24, 8]) if "BLK" in mode else index,
        "k_cache": rand(*shape, 64),
        "ckv_cache": rand(*shape, 512),
        "cache_mode": mode,
        "is_output_kv": mode != "Norm",
    }


def moe_gating_top_k() -> Arguments:
    return {
        "x": rand(5, 256),
        "k": 8,
        "bias": rand(256),
        "norm_type": 1,
        "routed_scaling_factor": 2.5,
        "out_flag": True,
    }


def moe_init_routing_v2(**changes: Any) -> Arguments:
    chosen = torch.stack([torch.randperm(16)[:4] for _ in range(6)]).int()
    return {
        "x": rand(6, 32),
        "expert_idx": chosen,
        "expert_num": 16,
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
        "active_expert_range": [0, 16],
        **changes,
    }


def grouped_matmul(**changes: Any) -> Arguments:
    return {
        "x": [rand(10, 32)],
        "weight": [rand(3, 32, 48)],
        "group_list": torch.tensor([4, 0, 6]),
        "split_item": 2,
        "group_type": 0,
        "group_list_type": 1,
        **changes,
    }


def grouped_matmul_int8() -> Arguments:
    return grouped_matmul(
        x=[int8(10, 32)],
        weight=[int8(3, 32, 48)],
        scale=[torch.rand(3, 48).to(BF16) / 100],
        per_token_scale=[torch.rand(10)],
        output_dtype=15,
    )


def grouped_matmul_list() -> Arguments:
    weights = [rand(32, 48) for _ in range(3)]
    return {"x": [rand(10, 32)], "weight": weights, "group_list": [4, 4, 10], "split_item": 3}


def moe_finalize_routing(mode: int = 2) -> Arguments:
    rows = (16, 3) if mode in (1, 3) else (24,)
    index = torch.randperm(48 if mode in (1, 3) else 24)[:24].int()
    return {
        "expanded_permuted_rows": rand(*rows, 32),
        "skip1": rand(6, 32),
        "skip2": None,
        "bias": rand(16, 32),
        "scales": rand(6, 4),
        "expanded_src_to_dst_row": index,
        "export_for_source_row": torch.randint(0, 16, (6, 4), dtype=torch.int32),
        "drop_pad_mode": mode,
    }


SAMPLES: dict[str, dict[str, Callable[[], Arguments]]] = {
    "npu_rms_norm": {"plain": lambda: {"input": rand(4, 6, 64), "gamma": rand(64), "epsilon": 1e-5}},
    "npu_add_rms_norm": {"plain": lambda: {"x1": rand(4, 64), "x2": rand(4, 64), "gamma": rand(64), "epsilon": 1e-5}},
    "npu_swiglu": {"plain": lambda: {"input": rand(4, 64)}, "dim 0": lambda: {"input": rand(4, 64), "dim": 0}},
    "npu_interleave_rope": {"plain": interleave_rope},
    "npu_rotary_mul": {
        "plain": rotary_mul,
        "interleave": lambda: rotary_mul(mode="interleave"),
        "TND": lambda: rotary_mul((6, 4, 64), (6, 1, 64)),
    },
    "npu_scatter_nd_update_": {
        "plain": lambda: {"input": rand(8, 16), "indices": ints(6, 1, 3)[:, None], "updates": rand(3, 16)}
    },
    "npu_lightning_indexer": {
        "plain": attention.lightning_indexer,
        "BSND": attention.lightning_indexer_bsnd,
        "TND": attention.lightning_indexer_tnd,
    },
    "npu_quant_lightning_indexer": {"plain": attention.quant_lightning_indexer},
    "npu_sparse_flash_attention": {
        "plain": attention.sparse_flash_attention,
        "BSND": attention.sparse_flash_attention_bsnd,
    },
    "npu_kv_quant_sparse_flash_attention": {"plain": attention.kv_quant_sparse_flash_attention},
    "npu_fused_infer_attention_score": attention.fused(second=False),
    "npu_fused_infer_attention_score_v2": attention.fused(second=True),
    "npu_kv_rmsnorm_rope_cache": {
        "plain": kv_rmsnorm_rope_cache,
        **{
            mode: lambda mode=mode: kv_rmsnorm_rope_cache(mode)
            for mode in ("PA", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ", "Norm")
        },
    },
    "npu_moe_gating_top_k": {"plain": moe_gating_top_k},
    "npu_moe_init_routing_v2": {
        "plain": moe_init_routing_v2,
        "part": lambda: moe_init_routing_v2(active_expert_range=[4, 9]),
        "cumsum": lambda: moe_init_routing_v2(expert_tokens_num_type=0, row_idx_type=1),
        "pairs": lambda: moe_init_routing_v2(expert_tokens_num_type=2, active_expert_range=[4, 9]),
        "int8": lambda: moe_init_routing_v2(quant_mode=1),
        "active": lambda: moe_init_routing_v2(active_num=10),
        "padded": lambda: moe_init_routing_v2(drop_pad_mode=1, expert_capacity=2),
    },
    "npu_grouped_matmul": {"plain": grouped_matmul, "int8": grouped_matmul_int8},
    "npu_grouped_matmul.List": {"plain": grouped_matmul_list},
    "npu_moe_finalize_routing": {
        "plain": moe_finalize_routing,
        **{str(mode): lambda mode=mode: moe_finalize_routing(mode) for mode in (0, 1, 3)},
    },
    "npu_moe_token_permute": {
        "plain": lambda: {"tokens": rand(6, 32), "indices": torch.randint(0, 8, (6, 4))},
        "some": lambda: {"tokens": rand(6, 32), "indices": torch.randint(0, 8, (6, 4)), "num_out_tokens": 20},
    },
    "npu_moe_token_unpermute": {
        "plain": lambda: {
            "permuted_tokens": rand(24, 32),
            "sorted_indices": torch.randperm(24, dtype=torch.int32),
            "probs": rand(6, 4),
        }
    },
    "npu_mla_prolog_v3": attention.prologs(),
    "npu_mla_prolog_v3_functional": {"plain": attention.mla_prolog_v3},
    "npu_transpose_batchmatmul": {
        "plain": lambda: {
            "input": rand(5, 4, 64),
            "weight": rand(4, 64, 32),
            "perm_x1": [1, 0, 2],
            "perm_y": [1, 0, 2],
        },
        "split": lambda: {"input": rand(4, 5, 64), "weight": rand(4, 64, 32), "batch_split_factor": 4},
    },
    "npu_dynamic_quant": {"plain": lambda: {"input": rand(3, 4, 64)}},
}
