"""Attention in the absorbed form on Hopper, by the kernel of ``hopper.py``: provider ``gluon``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from glm5_hal.backends._triton.absorbed import _attend, attend
from glm5_hal.backends._triton.declare import triton_kernel
from glm5_hal.backends._triton.rows import ALIGNED, Fields
from glm5_hal.backends._triton.tuning import Tuning
from glm5_hal.backends.cuda import GLUON, hopper
from glm5_hal.capability import arch, dtype, limit, one_of, package, when
from glm5_hal.formats import FORMATS
from glm5_hal.signature import Signature

#: What its layouts are made for.
LATENT, ROPE = 512, 64


def _fits(call: Signature) -> bool:
    q = call.tensors["q"]
    return q is None or q.dtype == "bfloat16" or not FORMATS[call.scalars["cache_format"]].group


REQUIRES = (
    arch("sm_90"),
    package("triton", GLUON),
    dtype("q", "bfloat16", "float16"),
    one_of("kv_lora_rank", LATENT),
    one_of("W", LATENT + ROPE),
    when(
        _fits,
        "rows of a quantised cache become bfloat16",
        "convert q to bfloat16",
        reads=(("q", "dtype"), ("cache_format", "value")),
    ),
)
PROVIDES = ("deterministic", "graph_safe")

#: Of so many tokens the rows that each has chosen come as fast to Triton's kernel, which has more of them on their way.
FEW = limit("T", 64)


@triton_kernel("mla_decode", requires=REQUIRES, provides=PROVIDES, provider="gluon")
def mla_decode(
    tuning: Tuning,
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
    return attend(
        tuning, "mla_decode", q, kv_cache, rope_cache, None, block_table, seq_lens, cu_seqlens_q,
        scale, kv_lora_rank, cache_format, invariant=False, forward=forward,
    )  # fmt: skip


@triton_kernel("sparse_mla", requires=(*REQUIRES, FEW), provides=PROVIDES, provider="gluon")
def sparse_mla(
    tuning: Tuning,
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
    return attend(
        tuning, "sparse_mla", q, kv_cache, rope_cache, indices, block_table, seq_lens, cu_seqlens_q,
        scale, kv_lora_rank, cache_format, invariant=False, forward=forward,
    )  # fmt: skip


def forward(held: Fields) -> tuple[object, Fields, Mapping[str, int]]:
    """Hopper's kernel; or everybody's, for a cache whose rows cannot be copied by 16 bytes, which no format forbids."""
    latent, rope, scale = held.latent, held.rope, held.scale
    sizes = ((latent, ALIGNED), (rope, ALIGNED), (scale, 4))
    if not all(field is None or _aligned(field, size) for field, size in sizes):
        return _attend, held, {}
    if rope is not None and scale is not None:
        held = Fields(_words(latent), _words(rope), _words(scale), held.group)
    return hopper.attend, held, {"BLOCK_H": hopper.HEADS, "BLOCK_N": hopper.KEYS, "num_warps": hopper.WARPS}


def _aligned(field: Tensor, size: int) -> bool:
    places = (field.data_ptr(), *(stride * field.itemsize for stride in field.stride()[:-1]))
    return not any(place % size for place in places)


def _words(field: Tensor) -> Tensor:
    return field if field.dtype == torch.int32 else field.view(torch.uint8).view(torch.int32)
