"""apply and remove: which modules of a model get which forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek_v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm_moe_dsa

from glm5_hal import context, ops
from glm5_hal import policy as policies
from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import attention, checks, experts, forwards
from glm5_hal.integrations.transformers.memory import Layout
from glm5_hal.state import CacheFormat, cache_format, preferred_formats

#: Decoders by class, and whether the rope of their indexer pairs dims (i, i + R/2).
DECODERS = {glm_moe_dsa.GlmMoeDsaModel: False, deepseek_v32.DeepseekV32Model: True}

#: Where an applied decoder keeps what `Applied` says, and a module what its forward needs.
KEY = "_glm5_hal"

#: A parameter that weights were derived from: its name, itself, its state then.
Source = tuple[str, Tensor, tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Applied:
    """What `apply` decided for a decoder.

    Attributes:
        layout: of its caches.
        policies: text by layer, where a layer has a policy of its own.
        sources: every parameter that weights were derived from, with its state then.
    """

    layout: Layout
    policies: Mapping[int, str]
    sources: tuple[Source, ...]

    def check_sources(self) -> None:
        """Raises HalError where a parameter was written, moved or converted since."""
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
    take about as much memory as kv_b_proj, the shared experts and the dense MLPs. Call it again after changing weights.

    Args:
        model: a GlmMoeDsa or DeepseekV32 model, causal or bare, on one device, in one floating dtype.
        policies: a policy text by layer ("cpu:reference"), for layers that another backend is to serve than the policy
            in force when the model runs. Not in compiled code.
        latent_format, index_format: names of cache formats; by default the favourites of the backend in force.
        page_size: tokens per cache page.

    Raises:
        HalError: TYPE for another model or for quantised, adapted or sharded layers, CONFIG for an option that the
            operators do not have, DEVICE for a model on several devices, POLICY or UNKNOWN for a bad policy or format.
    """
    decoder = decoder_of(model)
    remove(model)
    checks.supported(decoder)
    texts = _policies(policies or {}, len(decoder.layers))
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
    _set(decoder, forwards.decoder, Applied(layout, texts, tuple(sources(decoder.layers, "layers"))))
    if model is not decoder:
        model.__dict__["_prepare_cache_for_generation"] = MethodType(forwards.prepare_cache, model)
    return model


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


def sources(layers: nn.Module, name: str) -> Iterator[Source]:
    """Everything but the norms of layers, which are read where they are."""
    for path, tensor in [*layers.named_parameters(), *layers.named_buffers()]:
        if "layernorm" not in path or "_a_layernorm" in path:
            yield f"{name}.{path}", tensor, _state(tensor)


def check_unchanged(sources: Iterable[Source], *, again: str) -> None:
    """Raises HalError where a parameter was written, moved or converted since; ``again`` derives weights anew."""
    for name, parameter, before in sources:
        if _state(parameter) != before:
            raise HalError(
                "CONTRACT",
                f"{name} has changed since {again}, which derived other weights from it",
                value=name,
                fix=f"call {again} again after loading, moving or converting weights",
            )


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.device
