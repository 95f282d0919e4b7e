"""npu_mla_prolog_v3 and npu_mla_prolog_v3_functional.

Unquantised numerics follow the golden code of the second version, whose steps are the same: every product is summed in
float32; the outcomes of W_DQ and W_UQ/QR, the query norm and the absorbed query are rounded to bfloat16; the key's
norm and rotation are rounded only where they are stored. Quantised ones follow the golden code of this version.
qc_qr_scale and kc_scale multiply after gamma. Rotation reads interleaved pairs and writes halves.

Outputs that a mode does not have are empty (the page calls them nullptr, the op's shape inference gives [0] from CANN
8.5 on). cache_index is checked though the page leaves it to the caller: it must be in range, and two tokens may not
share a slot, since nothing says which one stays. A pertoken-pergroup row of 656 bytes is 512 int8, 64 bfloat16 and 4
float32 scales (the page of npu_kv_quant_sparse_flash_attention); its scales are a tile's largest magnitude / 127, as
everywhere else, which no golden code of this op shows. Assumed there: kr_cache is left alone, as its values are in
kv_cache. weight_quant_mode 3 to 5, the PA_BLK modes and k_nope_clip_alpha are not emulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import caches, quantize
from .constraints import Rules
from .formats import FRACTAL_NZ, ND, need_format
from .norms import rms
from .rope import deinterleaved, rotate_half

HIDDEN = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
Q_RANK, KV_RANK, ROPE = (1536, 2048), 512, 64
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
NOPE = (128, 192)
ROW = 656
MODES = ("PA_BSND", "PA_NZ", "PA_BLK_BSND", "PA_BLK_NZ", "BSND", "TND")
#: (weight_quant_mode, kv_cache_quant_mode) → query_quant_mode, for A2 and A3.
SCENES = {(0, 0): 0, (1, 0): 0, (1, 2): 0, (1, 3): 0, (2, 0): 0, (2, 1): 1, (2, 3): 0}
BF16, F32, I8 = torch.bfloat16, torch.float32, torch.int8


def mla_prolog_v3(**given: Any) -> tuple[Tensor, ...]:
    return _prolog("npu_mla_prolog_v3", given, given["kv_cache"], given["kr_cache"])


def mla_prolog_v3_functional(**given: Any) -> tuple[Tensor, ...]:
    kv_cache, kr_cache = given["kv_cache"].clone(), given["kr_cache"].clone()
    return *_prolog("npu_mla_prolog_v3_functional", given, kv_cache, kr_cache), kv_cache, kr_cache


def _prolog(op: str, given: dict[str, Any], kv_cache: Tensor, kr_cache: Tensor) -> tuple[Tensor, ...]:
    rules = Rules(op, "torch_npu-npu_mla_prolog_v3.md")
    _modes(rules, given)
    _shapes(rules, given)
    _dtypes(rules, given)
    slots = _slots(rules, given)
    x, lead = given["token_x"].flatten(0, -2), given["token_x"].shape[:-1]
    cos, sin = (given[name].flatten(0, -2).float() for name in ("rope_cos", "rope_sin"))
    wide, full = given["weight_quant_mode"] >= 1, given["weight_quant_mode"] == 2
    heads, nope, _ = given["weight_uk"].shape

    down = _project(x, given["weight_dq"], given["dequant_scale_x"], given["dequant_scale_w_dq"])
    down = down if full else down.to(BF16)
    c_q, _ = rms(down, given["rmsnorm_gamma_cq"], given["rmsnorm_epsilon_cq"])
    c_q = c_q * given["qc_qr_scale"]
    if wide:
        smooth = given["smooth_scales_cq"]
        normed, norm_scale = quantize.per_row(c_q if smooth is None else c_q * smooth)
    else:
        normed, norm_scale = c_q.to(BF16), None
    q = _project(normed, given["weight_uq_qr"], norm_scale, given["dequant_scale_w_uq_qr"])
    q = (q if wide else q.to(BF16).float()).view(len(x), heads, nope + ROPE)
    absorbed = torch.einsum("tnd,ndc->tnc", q[..., :nope].to(BF16).float(), given["weight_uk"].float()).to(BF16)
    rotated = _rotate(q[..., nope:], cos[:, None], sin[:, None]).to(BF16)
    query, q_scale = absorbed, torch.empty(0)
    if given["query_quant_mode"]:
        query, q_scale = quantize.per_row(absorbed)
        rotated = (rotated.float() * given["quant_scale_ckv"] / q_scale).to(BF16)

    kv = _project(x, given["weight_dkv_kr"], given["dequant_scale_x"], given["dequant_scale_w_dkv_kr"])
    c_kv, _ = rms(kv[:, :KV_RANK], given["rmsnorm_gamma_ckv"], given["rmsnorm_epsilon_ckv"])
    k_rope = _rotate(kv[:, KV_RANK:], cos, sin)
    _store(given, kv_cache, kr_cache, slots, c_kv * given["kc_scale"], k_rope)

    flag = given["query_norm_flag"]
    query_norm = normed.view(*lead, -1) if flag else normed.new_empty(0)
    norm_scale = norm_scale if flag and norm_scale is not None else torch.empty(0)
    return query.view(*lead, heads, -1), rotated.view(*lead, heads, ROPE), q_scale, query_norm, norm_scale


def _project(x: Tensor, weight: Tensor, x_scale: Tensor | None, w_scale: Tensor | None) -> Tensor:
    if weight.dtype is not I8:
        return x.float() @ weight.float()
    assert x_scale is not None
    assert w_scale is not None
    return (x.double() @ weight.double()).float() * x_scale * w_scale


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = deinterleaved(x.float())
    return pairs * cos + rotate_half(pairs) * sin


def _store(
    given: dict[str, Any], kv_cache: Tensor, kr_cache: Tensor, slots: Tensor, c_kv: Tensor, k_rope: Tensor
) -> None:
    mode = given["kv_cache_quant_mode"]
    if mode == 3:
        tiles, scales = quantize.per_row(c_kv.view(len(c_kv), -1, given["tile_size"]))
        parts = (tiles.flatten(1), k_rope.to(BF16).view(I8), scales.flatten(1).view(I8))
        kv_rows, kr_rows = torch.cat(parts, -1), None
    elif mode:
        kv_rows = quantize.int8(c_kv * given["quant_scale_ckv"].flatten())
        kr_rows = quantize.int8(k_rope * given["quant_scale_ckr"].flatten()) if mode == 2 else k_rope.to(kr_cache.dtype)
    else:
        kv_rows, kr_rows = c_kv.to(kv_cache.dtype), k_rope.to(kr_cache.dtype)
    for cache, rows in ((kv_cache, kv_rows), (kr_cache, kr_rows)):
        if rows is None:
            continue
        if given["cache_mode"] in ("BSND", "TND"):
            cache.view(-1, cache.shape[-1])[:] = rows
        else:
            group = 32 // cache.element_size() if given["cache_mode"] == "PA_NZ" else 0
            caches.write(cache, slots, rows, group)


def _modes(rules: Rules, given: dict[str, Any]) -> None:
    rules.one_of("cache_mode", given["cache_mode"], MODES)
    rules.beyond(given["cache_mode"].startswith("PA_BLK"), "cache_mode PA_BLK_*")
    weight, kv = given["weight_quant_mode"], given["kv_cache_quant_mode"]
    rules.one_of("weight_quant_mode", weight, range(6))
    rules.beyond(weight > 2, "weight_quant_mode 3 to 5 (fp8, hifloat8, mxfp8)")
    rules.need(
        (weight, kv) in SCENES, f"(weight_quant_mode, kv_cache_quant_mode) is one of {list(SCENES)}", (weight, kv)
    )
    query = SCENES[weight, kv]
    rules.need(given["query_quant_mode"] == query, f"query_quant_mode is {query}", given["query_quant_mode"])
    merged = int(kv == 3)
    for name in ("ckvkr_repo_mode", "quant_scale_repo_mode"):
        rules.need(given[name] == merged, f"{name} is {merged} with kv_cache_quant_mode {kv}", given[name])
    rules.need(kv != 3 or given["tile_size"] == 128, "tile_size is 128", given["tile_size"])
    rules.beyond(given["k_nope_clip_alpha"] is not None, "k_nope_clip_alpha")
    others = [name for name in given if name.endswith("_dtype") and given[name] is not None]
    rules.beyond(bool(others), f"{others}")


def _shapes(rules: Rules, given: dict[str, Any]) -> None:
    x, kv = given["token_x"], given["kv_cache_quant_mode"]
    rules.dims("token_x", x, 2, 3)
    rules.dims("weight_uk", given["weight_uk"], 3)
    rules.dims("weight_dq", given["weight_dq"], 2)
    lead, hidden = x.shape[:-1], x.shape[-1]
    rows = lead.numel()
    heads, nope, _ = given["weight_uk"].shape
    rank = given["weight_dq"].shape[1]
    rules.one_of("He", hidden, HIDDEN)
    rules.one_of("Hcq", rank, Q_RANK)
    rules.one_of("N", heads, HEADS)
    rules.one_of("D", nope, NOPE)
    rules.need(x.dim() == 2 or x.shape[0] <= 65536, "B is at most 65536", x)
    width = ROW if kv == 3 else KV_RANK
    shapes: dict[str, tuple[int, ...]] = {
        "weight_dq": (hidden, rank),
        "weight_uq_qr": (rank, heads * (nope + ROPE)),
        "weight_uk": (heads, nope, KV_RANK),
        "weight_dkv_kr": (hidden, KV_RANK + ROPE),
        "rmsnorm_gamma_cq": (rank,),
        "rmsnorm_gamma_ckv": (KV_RANK,),
        "rope_sin": (*lead, ROPE),
        "rope_cos": (*lead, ROPE),
        "dequant_scale_x": (rows, 1),
        "dequant_scale_w_dq": (1, rank),
        "dequant_scale_w_uq_qr": (1, heads * (nope + ROPE)),
        "dequant_scale_w_dkv_kr": (1, KV_RANK + ROPE),
        "quant_scale_ckv": (1,) if kv == 1 else (1, KV_RANK),
        "quant_scale_ckr": (1, ROPE),
        "smooth_scales_cq": (1, rank),
    }
    for name, shape in shapes.items():
        if given[name] is not None:
            rules.shape(name, given[name], *shape)
    mode = given["cache_mode"]
    for name, size in (("kv_cache", width), ("kr_cache", ROPE)):
        cache = given[name]
        if mode in ("BSND", "TND"):
            rules.need(x.dim() == (3 if mode == "BSND" else 2), f"token_x has the axes of cache_mode {mode}", x)
            rules.shape(name, cache, *lead, 1, size)
        else:
            rules.dims(name, cache, 4)
            rules.shape(name, cache, *cache.shape[:2], 1, size)
            block = cache.shape[1]
            rules.need(block % 16 == 0 and 16 <= block <= 1024, "BlockSize is a multiple of 16, at most 1024", block)
    rules.need(given["kv_cache"].shape[:-1] == given["kr_cache"].shape[:-1], "both caches have the same slots",
               [given["kv_cache"], given["kr_cache"]])  # fmt: skip


def _dtypes(rules: Rules, given: dict[str, Any]) -> None:
    weight, kv = given["weight_quant_mode"], given["kv_cache_quant_mode"]
    full, wide = I8 if weight == 2 else BF16, I8 if weight else BF16
    scale = {True: F32, False: None}
    dtypes = {
        **dict.fromkeys(("token_x", "weight_dq", "weight_dkv_kr"), full),
        **dict.fromkeys(("weight_uk", "rmsnorm_gamma_cq", "rmsnorm_gamma_ckv", "rope_sin", "rope_cos"), BF16),
        "weight_uq_qr": wide,
        "kv_cache": I8 if kv else BF16,
        "kr_cache": I8 if kv == 2 else BF16,
        **dict.fromkeys(("dequant_scale_x", "dequant_scale_w_dq", "dequant_scale_w_dkv_kr"), scale[weight == 2]),
        "dequant_scale_w_uq_qr": scale[weight > 0],
        "quant_scale_ckv": scale[kv in (1, 2)],
        "quant_scale_ckr": scale[kv == 2],
    }
    why = f"weight_quant_mode is {weight} and kv_cache_quant_mode {kv}"
    for name, dtype in dtypes.items():
        tensor = given[name]
        if dtype is None:
            rules.absent(why, **{name: tensor})
            continue
        rules.given(why, **{name: tensor})
        rules.dtype(name, tensor, dtype)
        rules.contiguous(**{name: tensor})
        nz = name in ("weight_dq", "weight_uq_qr", "weight_dkv_kr")
        need_format(rules, name, tensor, FRACTAL_NZ if nz else ND)
    rules.contiguous(**{name: given[name] for name in ("cache_index", "smooth_scales_cq")})
    smooth = given["smooth_scales_cq"]
    if not weight:
        rules.absent(why, smooth_scales_cq=smooth)
    elif smooth is not None:
        rules.dtype("smooth_scales_cq", smooth, F32)


def _slots(rules: Rules, given: dict[str, Any]) -> Tensor:
    mode, index, cache = given["cache_mode"], given["cache_index"], given["kv_cache"]
    lead = given["token_x"].shape[:-1]
    if mode in ("BSND", "TND"):
        rules.absent(f"cache_mode is {mode}", cache_index=index)
        return torch.empty(0, dtype=torch.int64)
    rules.given(f"cache_mode is {mode}", cache_index=index)
    rules.dtype("cache_index", index, torch.int64)
    rules.shape("cache_index", index, *lead)
    slots, count = index.flatten(), cache.shape[0] * cache.shape[1]
    inside = bool(((slots >= 0) & (slots < count)).all())
    rules.need(inside, f"cache_index is within [0, {count})", index.tolist())
    rules.need(len(slots.unique()) == len(slots), "cache_index has no duplicates", index.tolist())
    return slots


KERNELS = {"npu_mla_prolog_v3": mla_prolog_v3, "npu_mla_prolog_v3_functional": mla_prolog_v3_functional}
