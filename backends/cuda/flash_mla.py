"""FlashMLA's kernels for Hopper and Blackwell as kernels of ours.

Its conventions, of its interface, its tests' reference and its kernels at 9241ae3, and what is done about them:

- it knows batches of equally many tokens, or none: each token is a request of its own, which sees as many keys as the
  causal mask lets it. With 64 heads or more a token fills its tile, so nothing is lost by that.
- a key is named by its place in the cache, an absent one by -1, and their number is a multiple of 128 at most: indices
  are resolved and padded.
- lse is the natural logarithm, and +inf where exponentials add up to nothing: where there is no key, which here is
  -inf, and where no score is finite, which here is NaN.
- the dense kernel leaves a sum that is NaN out of its lse; its output says where.

Legend: T tokens, H heads, W = L+R absorbed width (latent, rope), K indices per token.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends.cuda.physical import aligned, per_step, requests_of, rows, slots, visible, whole_rows
from glm5_hal.capability import arch, dtype, limit, one_of, when

LATENT, WIDTH = 512, 576

#: What the number of indices is a multiple of, for every one of its kernels.
INDICES = 128

#: Tokens of a call that is split over the whole chip. It keeps parts of every token in fp32, 128 KB each.
TOKENS = 1024

POSITIVE = when(
    lambda call: call.scalars["scale"] > 0,
    "it looks for the largest score before it scales: only a positive scale keeps the order",
    "use a positive scale, or another kernel",
    reads=(("scale", "value"),),
)

FEW = when(
    lambda call: call.scalars["cache_format"] != "fp8_656" or call.axes["T"] <= TOKENS,
    f"over an fp8 cache T is at most {TOKENS}",
    "split the batch, or use another kernel",
    reads=(("cache_format", "value"), ("T", "value")),
)


def _library() -> Any:
    return import_module("flash_mla")


@kernel(
    "sparse_mla",
    "flash_mla",
    requires=(
        arch("sm_90", "sm_100", "sm_103"),
        dtype("q", "bfloat16"),
        one_of("cache_format", "latent_576", "fp8_656"),
        one_of("kv_lora_rank", LATENT),
        one_of("W", WIDTH),
        one_of("H", 64, 128),
        POSITIVE,
        FEW,
        whole_rows,
    ),
    provides=("deterministic", "graph_safe"),
)
def sparse_mla(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    rope_cache: Tensor | None = None,
    *,
    scale: float,
    kv_lora_rank: int,
    cache_format: str = "latent_576",
) -> tuple[Tensor, Tensor]:
    if _nothing(q, kv_cache, block_table, indices):
        return _no_keys(q)
    P, request, q = kv_cache.shape[1], requests_of(cu_seqlens_q, len(q)), aligned(q)
    if cache_format == "latent_576":
        keys, apart = rows(kv_cache)
        chosen = slots(indices, block_table, request, P, apart, INDICES)
        out, _, lse = _library().flash_mla_sparse_fwd(q, keys, chosen[:, None], scale, LATENT)
        return _ours(out, lse, (chosen < 0).all(-1))
    chosen = slots(indices, block_table, request, P, P, INDICES)
    key = ("flash_mla", "sparse", q.device, q.shape, P, chosen.shape)
    meta = per_step(key, _schedule, seq_lens, cu_seqlens_q)
    out, lse = _library().flash_mla_with_kvcache(
        q[:, None], kv_cache[:, :, None], None, None, LATENT, meta,
        softmax_scale=scale, is_fp8_kvcache=True, indices=chosen[:, None],
    )  # fmt: skip
    return _ours(out[:, 0], lse[..., 0], (chosen < 0).all(-1))


@kernel(
    "mla_decode",
    "flash_mla",
    requires=(
        arch("sm_90"),
        dtype("q", "bfloat16"),
        one_of("cache_format", "latent_576"),
        one_of("kv_lora_rank", LATENT),
        one_of("W", WIDTH),
        one_of("P", 64),
        limit("H", 128),
        limit("T", TOKENS),
        POSITIVE,
        whole_rows,
    ),
    provides=("deterministic", "graph_safe"),
)
def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    rope_cache: Tensor | None = None,
    *,
    scale: float,
    kv_lora_rank: int,
    cache_format: str = "latent_576",
) -> tuple[Tensor, Tensor]:
    if _nothing(q, kv_cache, block_table):
        return _no_keys(q)
    request = requests_of(cu_seqlens_q, len(q))
    seen = visible(cu_seqlens_q, seq_lens, request)
    key = ("flash_mla", "dense", q.device, q.shape, block_table.shape)
    meta = per_step(key, _schedule, seq_lens, cu_seqlens_q)
    out, lse = _library().flash_mla_with_kvcache(
        aligned(q)[:, None], kv_cache[:, :, None], block_table.index_select(0, request), seen, LATENT, meta,
        softmax_scale=scale,
    )  # fmt: skip
    out, lse = _ours(out[:, 0], lse[..., 0], seen == 0)
    return out, torch.where(out[..., 0].isnan(), torch.nan, lse)


def _schedule() -> Any:
    """Filled at its first call, from shapes and numbers of keys; good for calls that agree in both."""
    return _library().get_mla_metadata()[0]


def _ours(out: Tensor, lse: Tensor, keyless: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, L] outputs and [T, H] logarithms, of tokens of which some have no key [T]."""
    nothing, value = lse == torch.inf, torch.where(keyless, 0.0, torch.nan)[:, None]
    return torch.where(nothing[..., None], value[..., None].to(out.dtype), out), torch.where(
        nothing, value - torch.inf, lse
    )


def _nothing(*tensors: Tensor) -> bool:
    return any(t.numel() == 0 for t in tensors)


def _no_keys(q: Tensor) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    return q.new_zeros(T, H, LATENT), q.new_full((T, H), -torch.inf, dtype=torch.float32)
