"""apply and remove: which modules of a model get which forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek_v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm_moe_dsa

from glm5_hal import context, ops
from glm5_hal import policy as policies
from glm5_hal.errors import HalError
from glm5_hal.formats import CacheFormat, cache_format, preferred_formats
from glm5_hal.integrations.transformers import attention, checks, experts, forwards
from glm5_hal.integrations.transformers.memory import Layout
from glm5_hal.integrations.transformers.sources import Source, check_unchanged, sources

#: Decoders by class, and whether the rope of their indexer pairs dims (i, i + R/2).
DECODERS = {glm_moe_dsa.GlmMoeDsaModel: False, deepseek_v32.DeepseekV32Model: True}

#: Where an applied decoder keeps what `Applied` says, and a module what its forward needs.
KEY = "_glm5_hal"


@dataclass(frozen=True, eq=False)
class Applied:
    """What `apply` decided for a decoder.

    Attributes:
        layout: of its caches.
        policies: text by layer, where a layer has a policy of its own.
        sources: everything that weights were derived from.
    """

    layout: Layout
    policies: Mapping[int, str]
    sources: tuple[Source, ...]

    def check_sources(self) -> None:
        """Raises HalError where a weight was written, moved, converted or replaced since."""
        check_unchanged(self.sources, again="apply(model)")


def apply(
    model: Any,
    *,
    policies: Mapping[int, str] | None = None,
    latent_format: str | None = None,
    index_format: str | None = None,
    page_size: int = 64,
) -> Any:
    """Let a transformers GLM-5 or DeepSeek-V3.2 model run through the operators, in place. Returns it.

    Weights for the absorbed form, joined gate and up projections and the router in float32 are made now, once. They
    take about as much memory as kv_b_proj, the shared experts and the dense MLPs. On a CPU all projections but those of
    the routed experts are packed besides, which takes their size once more: of GLM-5, 2 % of the model. Call it again
    after changing weights: a pass that finds them changed is refused, a compiled one does not look.

    Args:
        model: a GlmMoeDsa or DeepseekV32 model, causal or bare, on one device, in one floating dtype.
        policies: a policy text by layer ("cpu:reference"), for layers that another backend is to serve than the policy
            in force when the model runs. Not in compiled code.
        latent_format, index_format: names of cache formats; by default the favourites of the backend in force.
        page_size: tokens per cache page.

    Raises:
        HalError: TYPE for another model or for quantised, adapted or sharded layers, CONFIG for an option that the
            operators do not have, DEVICE for a model on several devices, POLICY or UNKNOWN for a bad policy or format.
            Whatever is raised, the model is transformers' own then.
    """
    decoder = decoder_of(model)
    remove(model)
    try:
        _apply(decoder, policies or {}, latent_format, index_format, page_size)
    except BaseException:  # half a model on the operators is none
        remove(model)
        raise
    if model is not decoder:
        model.__dict__["_prepare_cache_for_generation"] = MethodType(forwards.prepare_cache, model)
    return model


def _apply(
    decoder: Any, policies: Mapping[int, str], latent_format: str | None, index_format: str | None, page_size: int
) -> None:
    checks.supported(decoder)
    texts = _policies(policies, len(decoder.layers))
    first = decoder.layers[0].self_attn
    latent_dims, index_dim = (first.kv_lora_rank, first.qk_rope_head_dim), decoder.config.index_head_dim
    backend = _backend(decoder)
    layout = Layout(
        latent=_format(latent_format, backend, "latent", latent_dims),
        index=_format(index_format, backend, "index", (index_dim,)),
        latent_dims=latent_dims,
        index_dim=index_dim,
        indexed=tuple(layer.self_attn.indexer is not None for layer in decoder.layers),
        page_size=page_size,
        dtype=decoder.embed_tokens.weight.dtype,
        device=decoder.embed_tokens.weight.device,
    )
    with torch.no_grad():
        for i, layer in enumerate(decoder.layers):
            with context.use(texts.get(i)):
                install(layer, i, decoder)
    _set(decoder.norm, forwards.norm, decoder.norm.variance_epsilon)
    _set(decoder, forwards.decoder, Applied(layout, texts, tuple(sources("layers", decoder.layers))))


def remove(model: Any) -> Any:
    """Give a model its own forwards back; what `apply` derived is dropped. Does nothing to a model without it."""
    for module in model.modules():
        if KEY in module.__dict__:
            del module.__dict__[KEY], module.__dict__["forward"]
    model.__dict__.pop("_prepare_cache_for_generation", None)
    return model


def decoder_of(model: Any) -> Any:
    """The decoder itself, of a causal model or of itself."""
    for candidate in (model, getattr(model, "model", None)):
        if type(candidate) in DECODERS:
            return candidate
    raise HalError(
        "TYPE",
        f"{type(model).__name__} is not a GLM-5 or DeepSeek-V3.2 model of transformers",
        value=type(model).__name__,
        fix=f"supported: {', '.join(c.__name__ for c in DECODERS)} and their ForCausalLM",
    )


def applied(model: Any) -> Applied:
    """What `apply` decided for a model. Raises HalError("CONTRACT") if it was not called."""
    found = decoder_of(model).__dict__.get(KEY)
    if found is None:
        raise HalError("CONTRACT", "the model does not run on the operators", value=None, fix="call apply(model) first")
    return found  # type: ignore[no-any-return]


def install(layer: Any, i: int, decoder: Any) -> None:
    """Let a layer, one of the decoder's kind, run through the operators. ``i`` is its place in the cache."""
    backend, half = _backend(decoder), DECODERS[type(decoder)]
    top_k = decoder.config.index_topk
    _set(
        layer.self_attn,
        forwards.attention,
        attention.derive(layer.self_attn, i, half=half, top_k=top_k, backend=backend),
    )
    if hasattr(layer.mlp, "experts"):
        _set(layer.mlp.gate, forwards.router, experts.router(layer.mlp.gate))
        _set(layer.mlp.shared_experts, forwards.mlp, experts.mlp(layer.mlp.shared_experts))
        _set(layer.mlp, forwards.experts, experts.experts(layer.mlp.experts, backend))
    else:
        _set(layer.mlp, forwards.mlp, experts.mlp(layer.mlp))
    _set(layer, forwards.layer, None)


def _set(module: Any, forward: Callable[..., Any], held: Any) -> None:
    module.__dict__[KEY], module.__dict__["forward"] = held, MethodType(forward, module)


def _backend(decoder: Any) -> str:
    """Who serves a model of this device and dtype under the policy in force."""
    weight = decoder.norm.weight.detach()
    return ops.rms_norm.choose(weight[None], weight, eps=1e-5).backend


def _format(name: str | None, backend: str, kind: str, dims: tuple[int, ...]) -> CacheFormat:
    """The named format, or the backend's favourite of those that can hold such widths."""
    if name is not None:
        fmt = cache_format(name)
        fmt.widths(*dims)
        return fmt
    for fmt in preferred_formats(backend, kind):
        if not (fmt.group and dims[0] % fmt.group):
            return fmt
    raise HalError(
        "CONFIG",
        f"backend {backend} has no {kind} cache format for widths {dims}",
        value=dims,
        fix=f"name one: apply(model, {kind}_format=...)",
    )


def _policies(texts: Mapping[int, str], layers: int) -> dict[int, str]:
    for i, text in texts.items():
        if not 0 <= i < layers:
            raise HalError("POLICY", f"no layer {i}; the model has {layers}", value=i, fix="count from 0")
        context.validate(policies.parse(text, f"apply, layer {i}"))
    return dict(texts)
