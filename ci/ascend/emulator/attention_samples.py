"""Valid calls of the attention ops, and what all samples are made of; :mod:`.samples` names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .formats import FRACTAL_NZ, format_cast

Arguments = dict[str, Any]
BF16 = torch.bfloat16
BLOCK = 16


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def nz(weight: Tensor) -> Tensor:
    return format_cast(weight, FRACTAL_NZ, None, None)


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(*shape) * 6.28
    return angle.cos().to(BF16), angle.sin().to(BF16)


def paged(lengths: tuple[int, ...]) -> Arguments:
    """Block tables of requests whose pages are strewn over 8 blocks, and their lengths."""
    columns = max(-(-length // BLOCK) for length in lengths)
    return {"block_table": torch.randperm(8, dtype=torch.int32)[: len(lengths) * columns].view(len(lengths), columns)}


def lightning_indexer() -> Arguments:
    return {
        "query": rand(3, 8, 128),
        "key": rand(8, BLOCK, 1, 128),
        "weights": rand(3, 8),
        "actual_seq_lengths_query": ints(1, 3),
        "actual_seq_lengths_key": ints(20, 37),
        **paged((20, 37)),
        "layout_query": "TND",
        "layout_key": "PA_BSND",
        "sparse_count": 24,
    }


def lightning_indexer_bsnd() -> Arguments:
    keys = {"query": rand(2, 3, 8, 128), "key": rand(2, 30, 1, 128), "weights": rand(2, 3, 8)}
    return {**keys, "sparse_count": 40, "return_value": True}


def lightning_indexer_tnd() -> Arguments:
    return {
        "query": rand(3, 8, 128),
        "key": rand(30, 1, 128),
        "weights": rand(3, 8),
        "actual_seq_lengths_query": ints(1, 3),
        "actual_seq_lengths_key": ints(10, 30),
        "layout_query": "TND",
        "layout_key": "TND",
        "sparse_count": 8,
    }


def quant_lightning_indexer() -> Arguments:
    half = torch.float16
    return {
        **lightning_indexer(),
        "query": int8(3, 8, 128),
        "key": int8(8, BLOCK, 1, 128),
        "weights": rand(3, 8, dtype=half),
        "query_dequant_scale": torch.rand(3, 8).to(half),
        "key_dequant_scale": torch.rand(8, BLOCK, 1).to(half),
        "query_quant_mode": 0,
        "key_quant_mode": 0,
    }


def selected(count: int, lengths: tuple[int, ...]) -> Tensor:
    """Valid-first indices of one row for each length, [rows, 1, count]."""
    rows = [torch.randperm(length)[:count].tolist() for length in lengths]
    return torch.tensor([[row + [-1] * (count - len(row))] for row in rows], dtype=torch.int32)


def sparse_flash_attention() -> Arguments:
    key = rand(8, BLOCK, 1, 512)
    return {
        "query": rand(3, 4, 512),
        "key": key,
        "value": key,
        "sparse_indices": selected(24, (20, 36, 37)),
        "scale_value": 1 / 16,
        **paged((20, 37)),
        "actual_seq_lengths_query": ints(1, 3),
        "actual_seq_lengths_kv": ints(20, 37),
        "query_rope": rand(3, 4, 64),
        "key_rope": rand(8, BLOCK, 1, 64),
        "layout_query": "TND",
        "layout_kv": "PA_BSND",
        "attention_mode": 2,
    }


def sparse_flash_attention_bsnd() -> Arguments:
    key = rand(2, 30, 1, 512)
    return {
        "query": rand(2, 2, 4, 512),
        "key": key,
        "value": key.clone(),
        "sparse_indices": selected(24, (29, 30, 12, 13)).view(2, 2, 1, 24),
        "scale_value": 1 / 16,
        "actual_seq_lengths_kv": ints(30, 13),
        "query_rope": rand(2, 2, 4, 64),
        "key_rope": rand(2, 30, 1, 64),
        "attention_mode": 2,
        "return_softmax_lse": True,
    }


def kv_quant_sparse_flash_attention() -> Arguments:
    rope, scales = rand(8, BLOCK, 1, 64), torch.rand(8, BLOCK, 1, 4) / 50
    nope = int8(8, BLOCK, 1, 512)
    plain = sparse_flash_attention()
    kept = {name: value for name, value in plain.items() if name not in ("key_rope", "query_rope")}
    return {
        **kept,
        "query": rand(3, 4, 576),
        "key": torch.cat((nope, rope.view(torch.int8), scales.view(torch.int8)), -1),
        "value": nope,
        "key_quant_mode": 2,
        "value_quant_mode": 2,
    }


def fused_mla(second: bool) -> Arguments:
    """Absorbed MLA over pages, two requests of 2 and 1 queries."""
    key = rand(8, 1, BLOCK, 512)
    words = ("actual_seq_qlen", "actual_seq_kvlen", "num_query_heads", "softmax_scale") if second else (
        "actual_seq_lengths", "actual_seq_lengths_kv", "num_heads", "scale")  # fmt: skip
    causal = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    return {
        "query": rand(3, 4, 512),
        "key": key,
        "value": key,
        "query_rope": rand(3, 4, 64),
        "key_rope": rand(8, 1, BLOCK, 64),
        "atten_mask": causal,
        **paged((20, 37)),
        **dict(zip(words, ([2, 3], [20, 37], 4, 1 / 16), strict=True)),
        "num_key_value_heads": 1,
        "input_layout": "TND",
        "sparse_mode": 3,
        "block_size": BLOCK,
    }


def fused_dense(second: bool, layout: str = "BNSD") -> Arguments:
    shape = {"BNSD": (2, 4, 6, 64), "BSND": (2, 6, 4, 64), "BSH": (2, 6, 256)}[layout.split("_")[0]]
    keys = {"BNSD": (2, 2, 9, 64), "BSND": (2, 9, 2, 64), "BSH": (2, 9, 128)}[layout.split("_")[0]]
    heads, scale = ("num_query_heads", "softmax_scale") if second else ("num_heads", "scale")
    lse = "return_softmax_lse" if second else "softmax_lse_flag"
    key = rand(*keys)
    return {
        "query": rand(*shape),
        "key": key,
        "value": rand(*keys),
        heads: 4,
        "num_key_value_heads": 2,
        scale: 0.125,
        "input_layout": layout,
        lse: True,
    }


def mla_prolog_v3(weight: int = 0, kv: int = 0, mode: str = "PA_BSND") -> Arguments:
    """GLM-5's ranks with the smallest hidden size and 2 heads; weight and kv are the quantisation modes."""
    hidden, rank, heads, nope, tokens = 1024, 2048, 2, 192, 3
    cos, sin = angles(tokens, 64)
    up = heads * (nope + 64)
    full = weight == 2

    def matrix(rows: int, columns: int, quantised: bool) -> Tensor:
        return nz(int8(rows, columns) if quantised else (torch.randn(rows, columns) / rows**0.5).to(BF16))

    width = 656 if kv == 3 else 512
    lead = (tokens,) if mode == "TND" else (4, BLOCK)
    kv_cache = int8(*lead, 1, width) if kv else rand(*lead, 1, width)
    made = {
        "token_x": int8(tokens, hidden) if full else rand(tokens, hidden),
        "weight_dq": matrix(hidden, rank, full),
        "weight_uq_qr": matrix(rank, up, weight > 0),
        "weight_uk": (torch.randn(heads, nope, 512) / nope**0.5).to(BF16),
        "weight_dkv_kr": matrix(hidden, 576, full),
        "rmsnorm_gamma_cq": rand(rank),
        "rmsnorm_gamma_ckv": rand(512),
        "rope_sin": sin,
        "rope_cos": cos,
        "kv_cache": kv_cache,
        "kr_cache": int8(*lead, 1, 64) if kv == 2 else rand(*lead, 1, 64),
        "cache_index": None if mode == "TND" else torch.tensor([5, 40, 17]),
        "cache_mode": mode,
        "query_norm_flag": True,
        "weight_quant_mode": weight,
        "kv_cache_quant_mode": kv,
        "query_quant_mode": int(kv == 1),
        "ckvkr_repo_mode": int(kv == 3),
        "quant_scale_repo_mode": int(kv == 3),
    }
    scales = {
        "dequant_scale_x": torch.rand(tokens, 1) if full else None,
        "dequant_scale_w_dq": torch.rand(1, rank) / 1000 if full else None,
        "dequant_scale_w_uq_qr": torch.rand(1, up) / 1000 if weight else None,
        "dequant_scale_w_dkv_kr": torch.rand(1, 576) / 1000 if full else None,
        "smooth_scales_cq": torch.rand(1, rank) + 0.5 if weight else None,
        "quant_scale_ckv": {1: torch.full((1,), 30.0), 2: torch.rand(1, 512) * 30}.get(kv),
        "quant_scale_ckr": torch.rand(1, 64) * 30 if kv == 2 else None,
    }
    return {**made, **{name: scale for name, scale in scales.items() if scale is not None}}


def fused(second: bool) -> dict[str, Callable[[], Arguments]]:
    layouts = ("BSND", "BSH", "BNSD_BSND", "BNSD_NBSD", "BSH_NBSD")
    dense = {layout: lambda layout=layout: fused_dense(second, layout) for layout in layouts}
    return {"plain": lambda: fused_mla(second), "BNSD": lambda: fused_dense(second), **dense}


def prologs() -> dict[str, Callable[[], Arguments]]:
    modes = ((1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 3))
    quantised = {f"{w}-{kv}": lambda w=w, kv=kv: mla_prolog_v3(w, kv) for w, kv in modes}
    layouts = {mode: lambda mode=mode: mla_prolog_v3(mode=mode) for mode in ("TND", "PA_NZ")}
    return {"plain": mla_prolog_v3, **layouts, **quantised}
