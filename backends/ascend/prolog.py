"""mla_prolog by npu_mla_prolog_v3, which also gives the normed query latent that the indexer wants.

Its conventions, and what is done about them:

- weights are [in, out] in the format FRACTAL_NZ: `weights.prepare` makes them so, once, and names them ascend_nz.
- it reads rope pairs side by side and stores them half a head apart, in queries and in the cache, while our formats
  hold pairs where they were. So it writes into a cache of this call's tokens alone; what it wrote is put in order and
  stored by slot from there, which also takes -1, pages of any size and both formats that are not quantised.
- its tables are of bfloat16 and have a column for every rope dim. Ours of float32 are rounded for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm5_hal.backend import kernel
from glm5_hal.backends.ascend import caches
from glm5_hal.backends.ascend.elementwise import columns
from glm5_hal.backends.ascend.needs import A2, A3, HEADS, LATENT, ROPE, UNQUANTISED, floats, has
from glm5_hal.backends.ascend.weights import NZ, fits
from glm5_hal.capability import arch, dtype, one_of, when

#: Tokens of a page of the call's own cache.
PAGE = 128


@kernel(
    "mla_prolog",
    "aclnn",
    requires=(
        arch(A2, A3),  # Ascend950 has the prolog, but is not documented for the scatter into the cache
        *has("npu_mla_prolog_v3", "npu_scatter_nd_update_", "npu_format_cast"),
        *floats("x", "q_a_norm", "kv_a_norm", allowed=("bfloat16",)),
        dtype("cos", "float32"),
        one_of("layout", "interleaved"),
        one_of("cache_format", *UNQUANTISED),
        one_of("L", LATENT),
        one_of("I", ROPE // 2),
        one_of("H", *HEADS),
        when(
            lambda call: fits(call.axes["E"], call.axes["Q"], call.axes["K"]),
            "hidden size, q_lora_rank and nope dims are of the documented ones: GLM-5's 6144, 2048 and 192 are",
            "use the parts: leave the weights plain",
            reads=(("E", "value"), ("Q", "value"), ("K", "value")),
        ),
        when(
            lambda call: call.scalars["weight_format"] == NZ,
            f"the projections are in FRACTAL_NZ, weight_format {NZ!r}",
            "prepare them, once: glm5_hal.prepare('mla_prolog', weights, backend='ascend')",
            reads=(("weight_format", "value"),),
        ),
    ),
    provides=("graph_safe",),
)
def mla_prolog(
    x: Tensor,
    w_q_a: Tensor,
    q_a_norm: Tensor,
    w_q_b: Tensor,
    w_kv_a: Tensor,
    kv_a_norm: Tensor,
    w_uk: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    rope_cache: Tensor | None = None,
    *,
    eps: float,
    layout: str = "interleaved",
    cache_format: str = "latent_576",
    weight_format: str = "plain",
) -> tuple[Tensor, Tensor]:
    T, H = len(x), w_uk.shape[0]
    if T == 0:
        return x.new_empty(T, H, LATENT + ROPE), x.new_empty(T, w_q_a.shape[0])
    cos, sin = (columns(table, "half").to(x.dtype) for table in (cos, sin))
    latent = x.new_empty(-(-T // PAGE), PAGE, 1, LATENT)
    rope = x.new_empty(-(-T // PAGE), PAGE, 1, ROPE)
    absorbed, turned, _, q_c, _ = torch.ops.npu.npu_mla_prolog_v3(
        x.contiguous(),
        w_q_a.transpose(0, 1),
        w_q_b.transpose(0, 1),
        w_uk.contiguous(),
        w_kv_a.transpose(0, 1),
        q_a_norm.contiguous(),
        kv_a_norm.contiguous(),
        sin,
        cos,
        latent,
        rope,
        cache_index=torch.arange(T, device=x.device),
        rmsnorm_epsilon_cq=eps,
        rmsnorm_epsilon_ckv=eps,
        cache_mode="PA_BSND",
        query_norm_flag=True,
    )
    caches.mla_cache_write.fn(
        latent.view(-1, LATENT)[:T],
        side_by_side(rope.view(-1, ROPE)[:T]),
        kv_cache,
        slot_mapping,
        rope_cache,
        cache_format=cache_format,
    )
    return torch.cat([absorbed, side_by_side(turned)], -1), q_c


def side_by_side(x: Tensor) -> Tensor:
    """Pairs that lie half a head apart, side by side."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)
