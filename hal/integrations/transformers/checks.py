"""What the operators cannot do, said before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import rope

#: The modules of a layer of which nothing but the weight is read: they must be plain linear layers without a bias.
LINEARS = (
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
    "wq_b", "wk", "weights_proj",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip

#: Where the classes of a layer's modules are from, beside the model's own file. An adapter is from elsewhere.
LIBRARIES = ("torch.nn.modules.", "transformers.activations")


def refuse(code: str, what: str, *, value: object = None, fix: str) -> NoReturn:
    """Raise a HalError, also while code is being compiled: dynamo runs this, and cannot trace the making of one."""
    raise HalError(code, what, value=value, fix=fix)


torch.compiler.assume_constant_result(refuse)  # type: ignore[no-untyped-call] # marks it; as a decorator it hides its type


def supported(decoder: Any) -> None:
    """Whether a decoder's modules and configuration are what the operators compute. Raises HalError if not."""
    config = decoder.config
    if config.attention_bias:
        _no("attention_bias=True", "the operators' projections have no bias")
    if config.hidden_act != "silu":
        _no(f"hidden_act={config.hidden_act!r}", "the gated activation is silu")
    rope.check(decoder.rotary_emb)
    for part in ("layers", "norm"):
        plain(part, getattr(decoder, part), like=decoder)
    for i, layer in enumerate(decoder.layers):
        latents = {getattr(layer.self_attn, n).variance_epsilon for n in ("q_a_layernorm", "kv_a_layernorm")}
        if len(latents) > 1:
            _no(f"layer {i}: the latents' norms have eps {sorted(latents)}", "both share one")
    devices = {t.device for t in decoder.parameters()}
    if len(devices) > 1 or any(d.type == "meta" for d in devices):
        refuse(
            "DEVICE",
            f"the model's parameters are on {', '.join(sorted(map(str, devices)))}",
            value=devices,
            fix="load it onto one device; models spread over several are not supported yet",
        )
    for name, parameter in decoder.named_parameters():
        if type(parameter.data) is not Tensor or not parameter.is_floating_point():
            _foreign(name, parameter.data)


def plain(name: str, root: nn.Module, *, like: nn.Module) -> None:
    """Whether all modules of a part are the model's own: of others (adapters, quantised layers) the weights would be
    read and the rest dropped. Raises HalError if not. ``like`` is the decoder whose kind they are."""
    own = (*LIBRARIES, type(like).__module__)
    for path, module in root.named_modules(prefix=name):
        linear = path.rpartition(".")[2] in LINEARS
        if not type(module).__module__.startswith(own) or (linear and type(module) is not nn.Linear):
            _foreign(path, module)
        if linear and module.bias is not None:
            _no(f"{path} has a bias", "the operators' projections have none")


def can_run(decoder: Any, kwargs: dict[str, Any]) -> None:
    """Whether a pass asks for something that the operators do not give. Raises HalError if so."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in decoder.parameters()):
        refuse(
            "GRAD",
            "the operators have no gradients, and the model's parameters require them",
            fix="call it under torch.no_grad(), or remove(model) to train",
        )
    if decoder.training and decoder.config.attention_dropout:
        refuse(
            "GRAD",
            f"the model is in training mode with attention_dropout={decoder.config.attention_dropout}",
            value=decoder.config.attention_dropout,
            fix="call model.eval(), or remove(model) to train",
        )
    if kwargs.get("output_attentions", getattr(decoder.config, "output_attentions", False)):
        _no("output_attentions=True", "attention weights are never made whole")
    if not kwargs.get("is_causal", True):
        _no("is_causal=False", "attention over a cache is causal")
    if kwargs.get("cu_seq_lens_q") is not None:
        _no("cu_seq_lens_q", "packed sequences of transformers are not supported; pass a batch")


def mask(attention_mask: Any) -> Tensor | None:
    """A 2D mask of real tokens, or None."""
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        return attention_mask
    what = (
        f"shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    )
    refuse(
        "SHAPE",
        f"attention_mask is {what}; the operators know causal attention with padding only",
        value=what,
        fix="pass the 2D mask [batch, columns], nonzero for real tokens; other masks need remove(model)",
    )


def not_packed(position_ids: Tensor) -> None:
    """transformers reads positions that do not count up, without mask and cache, as several packed sequences."""
    if position_ids.shape[-1] > 1 and not bool((position_ids.diff(dim=-1) == 1).all()):
        _no("position_ids that do not count up, with neither mask nor cache", "packed sequences are not supported")


def listing(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join([*ordered[:8], *([f"and {len(ordered) - 8} more"] if len(ordered) > 8 else [])])


def _no(what: str, why: str) -> None:
    refuse("CONFIG", f"{what}: {why}", value=what, fix="change it, or run the model without apply")


def _foreign(name: str, value: Any) -> None:
    refuse(
        "TYPE",
        f"{name} is {type(value).__name__}; only plain floating-point weights are supported",
        value=type(value).__name__,
        fix="dequantise the model, merge adapters, and gather sharded parameters, then call apply(model)",
    )
