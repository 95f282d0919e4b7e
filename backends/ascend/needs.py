"""What the vendor's documents ask of a call, as requirements: each is one sentence of them, with what to do about it.

The documents are those of op-plugin at 517f2e7d (torch_npu 2.13) and of CANN's aclnn interfaces. A limit that they do
not state is not one here either.
"""

from __future__ import annotations

from glm5_hal.capability import arch, dtype, feature, one_of, when
from glm5_hal.decision import Requirement

#: Generations, as the probe names them: Atlas A2 (910B), Atlas A3 (910_93), Ascend950.
A2, A3, A5 = "A2", "A3", "Ascend950"

#: Where an op is documented for the two generations that have int8 and no fp8.
A2_A3 = arch(A2, A3)

#: The dtypes of an attention's queries and caches.
HALVES = ("bfloat16", "float16")
FLOATS = (*HALVES, "float32")

#: The vendor's ops that kernels call; the probe reports those that the installed torch_npu has.
OPS = (
    "npu_add_rms_norm",
    "npu_format_cast",
    "npu_fused_infer_attention_score_v2",
    "npu_grouped_matmul",
    "npu_lightning_indexer",
    "npu_mla_prolog_v3",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_init_routing_v2",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_scatter_nd_update_",
    "npu_sparse_flash_attention",
    "npu_swiglu",
)

UNQUANTISED = ("latent_512_rope_64", "latent_576")
APART = ("latent_512_rope_64",)

#: Of absorbed attention: the only widths that are documented.
LATENT, ROPE = 512, 64
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


def available() -> frozenset[str]:
    """Which of OPS this process has."""
    import torch

    return frozenset(name for name in OPS if hasattr(torch.ops.npu, name))


def has(*names: str) -> tuple[Requirement, ...]:
    return tuple(feature(name, "install the torch_npu that goes with torch 2.13, or a later one") for name in names)


def floats(*args: str, allowed: tuple[str, ...] = FLOATS) -> tuple[Requirement, ...]:
    return tuple(dtype(arg, *allowed) for arg in args)


#: Of every op that resolves a block table itself.
PAGES = when(
    lambda call: call.axes["P"] % 16 == 0 and call.axes["P"] <= 1024,
    "a page holds a multiple of 16 keys, 1024 at most",
    "allocate the cache with a page_size of 128",
    reads=(("P", "value"),),
)

#: The widths of absorbed attention.
ABSORBED = (one_of("kv_lora_rank", LATENT), one_of("W", LATENT + ROPE), one_of("H", *HEADS))
