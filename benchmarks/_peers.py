"""What else computes an op on a GPU: torch's own functions, and other libraries where they are installed.

A peer need not keep the op's contract. It may round where the op does not, choose otherwise among equals, take its keys
unpaged, or write over its input; what it must do beforehand, such as a plan, is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Call = Callable[[], Any]
Args = Mapping[str, Any]


def peers(op: str, args: Args) -> Iterator[tuple[str, Call | str]]:
    """Name and call of every peer that can be built here, or why one of an installed library cannot."""
    for name, build in PEERS.get(op, {}).items():
        try:
            yield name, build(args)
        except ModuleNotFoundError:
            continue
        except Exception as problem:  # noqa: BLE001 - of another version, or without memory
            yield name, f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"


# --- torch -----------------------------------------------------------------------------------------------------------


def _rms_norm(args: Args) -> Call:
    x, weight = args["x"], args["weight"]
    return lambda: functional.rms_norm(x, x.shape[-1:], weight, args["eps"])


def _add_rms_norm(args: Args) -> Call:
    x, residual, weight = args["x"], args["residual"], args["weight"]
    return lambda: functional.rms_norm(x + residual, x.shape[-1:], weight, args["eps"])


def _silu(args: Args) -> Call:
    gate, up = args["x"].chunk(2, -1)
    return lambda: functional.silu(gate) * up


def _topk(args: Args) -> Call:
    return lambda: args["scores"].topk(args["top_k"], sorted=False)


def _sdpa_prefill(args: Args) -> Call:
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = (args[name].transpose(0, 1)[None] for name in "qkv")
    mask = causal_lower_right(q.shape[2], k.shape[2])
    return lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=args["scale"])


def _rows(args: Args) -> Tensor:
    """[B, S, W] keys of every request, unpaged."""
    return args["kv_cache"][args["block_table"].long()].flatten(1, 2)  # type: ignore[no-any-return]


def _over(q: Tensor, keys: Tensor, args: Args) -> Call:
    """[n, H, W] queries of n batches over [n, S, W] keys, heads as queries of one head."""
    k, v = keys[:, None], keys[:, None, :, : args["kv_lora_rank"]]
    return lambda: functional.scaled_dot_product_attention(q[:, None], k, v, scale=args["scale"])


def _sdpa_decode(args: Args) -> Call:
    _only(args, "latent_576")
    return _over(args["q"], _rows(args), args)


def _sdpa_sparse(args: Args) -> Call:
    """Of one request or of one token each: the chosen rows are gathered every time."""
    _only(args, "latent_576")
    keys, chosen = _rows(args), args["indices"].clamp_min(0).long()
    whose = torch.arange(len(chosen), device=keys.device) if len(keys) > 1 else torch.zeros_like(chosen[:, 0])
    return lambda: _over(args["q"], keys[whose[:, None], chosen], args)()


def _grouped_mm(args: Args) -> Call:
    grouped: Any = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    x, weight, ends = args["x"], args["weight"].transpose(-2, -1), args["expert_offsets"][1:].contiguous()
    return lambda: grouped(x, weight, offs=ends)


def _only(args: Args, form: str) -> None:
    if args["cache_format"] != form:
        raise ModuleNotFoundError(form)


# --- FlashInfer ------------------------------------------------------------------------------------------------------


def _fi_norm(args: Args) -> Call:
    norm = import_module("flashinfer.norm")
    return lambda: norm.rmsnorm(args["x"], args["weight"], args["eps"])


def _fi_add_norm(args: Args) -> Call:
    norm, x, residual = import_module("flashinfer.norm"), args["x"].clone(), args["residual"].clone()
    return lambda: norm.fused_add_rmsnorm(x, residual, args["weight"], args["eps"])


def _fi_silu(args: Args) -> Call:
    activation = import_module("flashinfer.activation")
    return lambda: activation.silu_and_mul(args["x"])


def _fi_topk(args: Args) -> Call:
    library = import_module("flashinfer")
    return lambda: library.top_k(args["scores"], args["top_k"])


def _fi_decode(args: Args) -> Call:
    """FlashInfer 0.7 or newer. It keeps parts of a sum in the storage dtype."""
    library = import_module("flashinfer.mla")
    _only(args, "latent_576")
    q, L, cache = args["q"], args["kv_lora_rank"], args["kv_cache"]
    wrapper = library.BatchMLAPagedAttentionWrapper(torch.empty(128 << 20, dtype=torch.int8, device=q.device))
    wrapper.plan(
        metadata=library.MLAPlanMetadata.dense(args["cu_seqlens_q"], args["block_table"], args["seq_lens"]),
        num_heads=q.shape[1], head_dim_ckv=L, head_dim_kpe=q.shape[2] - L, page_size=cache.shape[1], causal=True,
        sm_scale=args["scale"], q_data_type=q.dtype, kv_data_type=cache.dtype, query_layout="split",
        kv_cache_layout="split", lse_mode="base2",
    )  # fmt: skip
    query, keys = (q[..., :L], q[..., L:]), (cache[..., :L], cache[..., L:])
    return lambda: wrapper.run(query=query, kv_cache=keys, return_lse=True)


# --- vLLM ------------------------------------------------------------------------------------------------------------


def _vllm_norm(args: Args) -> Call:
    ops, out = import_module("vllm._custom_ops"), torch.empty_like(args["x"])
    return lambda: ops.rms_norm(out, args["x"], args["weight"], args["eps"])


def _vllm_add_norm(args: Args) -> Call:
    ops, x, residual = import_module("vllm._custom_ops"), args["x"].clone(), args["residual"].clone()
    return lambda: ops.fused_add_rms_norm(x, residual, args["weight"], args["eps"])


def _vllm_silu(args: Args) -> Call:
    import_module("vllm._custom_ops")
    out = args["x"].new_empty(*args["x"].shape[:-1], args["x"].shape[-1] // 2)
    return lambda: torch.ops._C.silu_and_mul(out, args["x"])


def _vllm_decode(args: Args) -> Call:
    """Its Triton backend for MLA, without what that allocates and fills every time."""
    library = import_module("vllm.v1.attention.ops.triton_decode_attention")
    _only(args, "latent_576")
    q, L, table, lens = args["q"], args["kv_lora_rank"], args["block_table"], args["seq_lens"]
    keys, (B, H) = args["kv_cache"].unsqueeze(2), q.shape[:2]
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count
    splits = min(1 << (max(1, int(lens.max()) // 512) - 1).bit_length(), 2 * cores)
    out, lse = q.new_empty(B, H, L), q.new_empty(B, H)
    parts, one = q.new_empty(B, H, splits, L + 1, dtype=torch.float32), q.new_ones((), dtype=torch.float32)
    return lambda: library.decode_attention_fwd(
        q, keys, keys[..., :L], out, lse, table, lens, parts, splits, args["scale"], keys.shape[1],
        k_scale=one, v_scale=one, is_mla=True,
    )  # fmt: skip


PEERS: dict[str, dict[str, Callable[[Args], Call]]] = {
    "rms_norm": {"torch rms_norm": _rms_norm, "flashinfer": _fi_norm, "vllm": _vllm_norm},
    "add_rms_norm": {"torch rms_norm": _add_rms_norm, "flashinfer": _fi_add_norm, "vllm": _vllm_add_norm},
    "silu_and_mul": {"torch silu": _silu, "flashinfer": _fi_silu, "vllm": _vllm_silu},
    "topk_indices": {"torch topk": _topk, "flashinfer": _fi_topk},
    "mla_prefill": {"torch sdpa": _sdpa_prefill},
    "mla_decode": {"torch sdpa": _sdpa_decode, "flashinfer": _fi_decode, "vllm triton": _vllm_decode},
    "sparse_mla": {"gather + sdpa": _sdpa_sparse},
    "grouped_gemm": {"torch grouped_mm": _grouped_mm},
}
