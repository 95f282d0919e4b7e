"""One layer's attention and indexer, over the operators.

Legend: T tokens, E hidden size, H heads, K nope dims, R rope dims, L kv_lora_rank, V value dims, D index head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from glm5_hal import ops
from glm5_hal.integrations.transformers.cache import PagedCache
from glm5_hal.integrations.transformers.step import Step
from glm5_hal.ops._common.packed import pack
from glm5_hal.ops._common.products import linear, multiply
from glm5_hal.prepared import Prepared, prepare


@dataclass(frozen=True, eq=False)
class Pass:
    """What a pass hands from layer to layer beside the hidden states.

    ``reuse`` says that layers take the choice of keys they are given, also those that have an indexer.
    """

    step: Step
    cache: PagedCache
    cos: Tensor
    sin: Tensor
    reuse: bool = False


@dataclass(frozen=True, eq=False)
class Indexer:
    """One layer's lightning indexer.

    Attributes:
        weights: of `indexer_prolog`, as the backend likes them.
        plain: the same as the model has them, for what is computed outside that op. They take no memory of their own.
        heads, eps, scale: its options; ``scale`` is num_heads^-0.5 · D^-0.5.
        layout: "interleaved" for GLM-5, "half" for DeepSeek-V3.2.
        top_k: keys to select.
    """

    weights: Prepared
    plain: Mapping[str, Tensor]
    heads: int
    eps: float
    scale: float
    layout: str
    top_k: int

    def select(self, x: Tensor, q_c: Tensor, at: Pass, layer: int) -> Tensor:
        """Write the keys of ``x [T, E]`` and choose each token's keys: [T, top_k] int32."""
        step, index_cache, format = at.step, at.cache.index[layer], at.cache.layout.index.name
        q, weights = ops.indexer_prolog(
            x, q_c, **self.weights.tensors, cos=at.cos, sin=at.sin, index_cache=index_cache, slot_mapping=step.slots,
            num_heads=self.heads, weights_scale=self.scale, eps=self.eps, layout=self.layout, cache_format=format,
            weight_format=self.weights.format,
        )  # fmt: skip
        chosen: Tensor = ops.lightning_indexer(
            q, weights, index_cache, step.block_table, step.seq_lens, step.cu_seqlens_q, top_k=self.top_k,
            cache_format=format,
        )  # fmt: skip
        return chosen

    def write(self, x: Tensor, at: Pass, layer: int) -> None:
        """Write the keys of ``x [T, E]`` only: nothing is chosen now, but later tokens will choose."""
        w, rotary = self.plain, 2 * at.cos.shape[-1]
        k = linear(x, w["w_k"])
        k = functional.layer_norm(
            k, k.shape[-1:], w["k_norm_weight"].to(k.dtype), w["k_norm_bias"].to(k.dtype), self.eps
        )
        k = torch.cat([ops.rope(k[..., :rotary], at.cos, at.sin, layout=self.layout), k[..., rotary:]], -1)
        ops.index_cache_write(k, at.cache.index[layer], at.step.slots, cache_format=at.cache.layout.index.name)


@dataclass(frozen=True, eq=False)
class Attention:
    """One layer's MLA.

    Attributes:
        layer: its index.
        weights: of `mla_prolog`, as the backend likes them.
        plain: the same as the model has them, for full heads. They take no memory of their own.
        w_uv: kv_b_proj's value rows, [H, L, V].
        w_kv_b: kv_b_proj, [H·(K+V), L].
        w_o: o_proj, [E, H·V].
        eps: of the latents' norms.
        scale: of the softmax.
        indexer: None where an earlier layer's choice is used.
        top_k: how many keys are attended to at most.
    """

    layer: int
    weights: Prepared
    plain: Mapping[str, Tensor]
    w_uv: Tensor
    w_kv_b: Tensor
    w_o: Tensor
    eps: float
    scale: float
    indexer: Indexer | None
    top_k: int

    def __call__(self, x: Tensor, at: Pass, chosen: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[T, E] normed hidden states to [T, E], and the choice of keys for layers that share it (None: all)."""
        sparse = at.step.longest > self.top_k
        if at.step.first and not sparse:
            heads, q_c = self._full_heads(x, at)
        else:
            q, q_c = self._absorbed_queries(x, at)
            heads = None
        if self.indexer is not None and sparse and not at.reuse:
            chosen = self.indexer.select(x, q_c, at, self.layer)
        elif self.indexer is not None:
            self.indexer.write(x, at, self.layer)
            chosen = chosen if sparse else None
        if heads is None:
            heads = self._absorbed(q, at, chosen)
        return linear(heads.flatten(1), self.w_o), chosen

    def _held(self, at: Pass) -> dict[str, Any]:
        return dict(zip(at.cache.layout.latent.tensors, at.cache.latent[self.layer], strict=True))

    def _absorbed_queries(self, x: Tensor, at: Pass) -> tuple[Tensor, Tensor]:
        """Queries [T, H, L+R] and the query latent; latents go into the cache."""
        made: tuple[Tensor, Tensor] = ops.mla_prolog(
            x, **self.weights.tensors, cos=at.cos, sin=at.sin, slot_mapping=at.step.slots, **self._held(at),
            eps=self.eps, cache_format=at.cache.layout.latent.name, weight_format=self.weights.format,
        )  # fmt: skip
        return made

    def _absorbed(self, q: Tensor, at: Pass, chosen: Tensor | None) -> Tensor:
        """[T, H, V], over the chosen keys of the cache or all of them."""
        step, held = at.step, self._held(at)
        common = (step.block_table, step.seq_lens, step.cu_seqlens_q, held.get("rope_cache"))
        options = {
            "scale": self.scale,
            "kv_lora_rank": self.w_uv.shape[1],
            "cache_format": at.cache.layout.latent.name,
        }
        if chosen is None:
            z, _ = ops.mla_decode(q, held["kv_cache"], *common, **options)
        else:
            z, _ = ops.sparse_mla(q, held["kv_cache"], chosen, *common, **options)
        return multiply(z.transpose(0, 1), self.w_uv).transpose(0, 1)

    def _full_heads(self, x: Tensor, at: Pass) -> tuple[Tensor, Tensor]:
        """[T, H, V] and the query latent, where nothing was cached before: keys and values need no cache to be read."""
        w, (H, L, V), T, R = self.plain, self.w_uv.shape, x.shape[0], 2 * at.cos.shape[-1]
        q_c = ops.rms_norm(linear(x, w["w_q_a"]), w["q_a_norm"], eps=self.eps)
        q = linear(q_c, w["w_q_b"]).view(T, H, -1)
        K = q.shape[-1] - R
        latent, k_rope = linear(x, w["w_kv_a"]).tensor_split([L], -1)
        kv_c = ops.rms_norm(latent, w["kv_a_norm"], eps=self.eps)
        k_pe = ops.rope(k_rope, at.cos, at.sin)
        ops.mla_cache_write(
            kv_c, k_pe, slot_mapping=at.step.slots, cache_format=at.cache.layout.latent.name, **self._held(at)
        )
        q[..., K:] = ops.rope(q[..., K:], at.cos, at.sin)
        k_nope, v = linear(kv_c, self.w_kv_b).view(T, H, K + V).tensor_split([K], -1)
        k = torch.cat([k_nope, k_pe[:, None].expand(T, H, R)], -1)
        cu = at.step.cu_seqlens_q
        out, _ = ops.mla_prefill(q, k, v, cu, cu, scale=self.scale)
        return out, q_c


# --- from transformers' modules --------------------------------------------------------------------------------------


def derive(module: Any, layer: int, *, half: bool, top_k: int, backend: str) -> Attention:
    """An attention layer's weights and options, in the form that the backend likes best.

    ``half`` says that the indexer's rope pairs dims (i, i + R/2), as DeepSeek-V3.2's does.
    """
    H, K, V, L = module.num_heads, module.qk_nope_head_dim, module.v_head_dim, module.kv_lora_rank
    w_kv_b = module.kv_b_proj.weight.detach()
    per_head = w_kv_b.view(H, K + V, L)
    plain = _detached(
        w_q_a=module.q_a_proj.weight,
        q_a_norm=module.q_a_layernorm.weight,
        w_q_b=module.q_b_proj.weight,
        w_kv_a=module.kv_a_proj_with_mqa.weight,
        kv_a_norm=module.kv_a_layernorm.weight,
        w_uk=per_head[:, :K],
    )
    return Attention(
        layer=layer,
        weights=prepare("mla_prolog", plain, backend=backend),
        plain=plain,
        w_uv=per_head[:, K:].transpose(1, 2).contiguous(),
        w_kv_b=w_kv_b,
        w_o=pack(module.o_proj.weight.detach()),
        eps=module.q_a_layernorm.variance_epsilon,
        scale=module.scaling,
        indexer=None if module.indexer is None else _indexer(module.indexer, half=half, backend=backend),
        top_k=top_k,
    )


def _indexer(module: Any, *, half: bool, backend: str) -> Indexer:
    plain = _detached(
        w_q_b=module.wq_b.weight,
        w_k=module.wk.weight,
        k_norm_weight=module.k_norm.weight,
        k_norm_bias=module.k_norm.bias,
        w_weights=module.weights_proj.weight,
    )
    return Indexer(
        weights=prepare("indexer_prolog", plain, backend=backend),
        plain=plain,
        heads=module.n_heads,
        eps=module.k_norm.eps,
        scale=module.n_heads**-0.5 * module.softmax_scale,
        layout="half" if half else "interleaved",
        top_k=module.index_topk,
    )


def _detached(**weights: Tensor) -> dict[str, Tensor]:
    return {name: w.detach() for name, w in weights.items()}
