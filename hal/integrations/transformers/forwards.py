"""The forwards that `apply` puts in place of a model's own. ``self`` is transformers' module.

Legend: B rows, S columns, T real tokens, E hidden size.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from glm5_hal import context, ops
from glm5_hal.integrations.transformers import checks, rope
from glm5_hal.integrations.transformers.attention import Pass
from glm5_hal.integrations.transformers.cache import PagedCache
from glm5_hal.integrations.transformers.checks import refuse
from glm5_hal.integrations.transformers.step import active


@merge_with_config_defaults  # type: ignore[untyped-decorator] # transformers' own, around its own forward
@capture_outputs  # type: ignore[untyped-decorator]
def decoder(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """In place of the decoder's: the step is made here, once, and every layer gets it."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")  # transformers' own words
    compiling = torch.compiler.is_compiling()
    checks.can_run(self, kwargs)
    if not compiling:
        self._glm5_hal.check_sources()
    hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    B, S, _ = hidden.shape
    mask = checks.mask(attention_mask)
    if position_ids is not None and mask is None and past_key_values is None and not use_cache:
        checks.not_packed(position_ids)
    cache = _cache(self, past_key_values, use_cache)
    at = begin(self.rotary_emb, cache, B, S, mask, position_ids)
    chosen = None
    with active(at.step):
        for i, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            with _policy(self, i, compiling):
                hidden, chosen = layer(hidden, at=at, chosen=chosen)
    cache.advance(at.step)
    return MoeModelOutputWithPast(
        last_hidden_state=self.norm(hidden), past_key_values=cache if use_cache or past_key_values is not None else None
    )


def _cache(self: Any, given: Any, use_cache: bool | None) -> PagedCache:
    if given is None:
        return PagedCache(self, keep=bool(use_cache))
    if not isinstance(given, PagedCache):
        refuse(
            "TYPE",
            f"past_key_values is {type(given).__name__}; the operators write a PagedCache",
            value=type(given).__name__,
            fix="leave it out, or pass glm5_hal.integrations.transformers.PagedCache(model)",
        )
    return given


def begin(rotary: Any, cache: PagedCache, B: int, S: int, mask: Tensor | None, position_ids: Tensor | None) -> Pass:
    """The step of a pass over ``[B, S]`` tokens, and its rotary tables. The cache must be advanced when it has run."""
    step = cache.step(B, S, mask)
    if position_ids is None:
        position_ids = torch.arange(S, device=step.slots.device)[None] + cache.seen
    positions = step.take(position_ids.to(step.slots.device).expand(B, S).flatten())
    wide = torch.float64 if cache.layout.dtype == torch.float64 else torch.float32
    return Pass(step, cache, *rope.tables(rotary, positions, wide))


def _policy(self: Any, i: int, compiling: bool) -> Any:
    text = self._glm5_hal.policies.get(i)
    if text is None:
        return nullcontext()
    if compiling:
        refuse(
            "POLICY",
            f"layer {i} has a policy of its own, which compiled code cannot keep",
            value=text,
            fix="set one policy around the compiled call with glm5_hal.use, or do not compile",
        )
    return context.use(text)


def layer(self: Any, hidden: Tensor, *, at: Pass, chosen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """In place of a decoder layer's: [B, S, E] and the choice of keys, if it was made."""
    before, after = self.input_layernorm, self.post_attention_layernorm
    x = ops.rms_norm(hidden, before.weight, eps=before.variance_epsilon)
    attended, _, chosen = self.self_attn(x, at=at, chosen=chosen)
    x, hidden = ops.add_rms_norm(attended, hidden, after.weight, eps=after.variance_epsilon)
    return hidden + self.mlp(x), chosen


def attention(self: Any, x: Tensor, *, at: Pass, chosen: Tensor | None) -> tuple[Tensor, None, Tensor | None]:
    """In place of an attention's: [B, S, E], no attention weights, and the choice of keys."""
    B, S, E = x.shape
    out, chosen = self._glm5_hal(at.step.take(x.view(B * S, E)), at, chosen)
    return at.step.put(out, B * S).view(B, S, E), None, chosen


def experts(self: Any, x: Tensor) -> Tensor:
    """In place of a mixture's: [B, S, E]."""
    tokens = x.view(-1, x.shape[-1])
    _, weights, ids = self.gate(tokens)
    out: Tensor = self._glm5_hal(tokens, weights, ids, self.shared_experts(tokens))
    return out.view(x.shape)


def router(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of a router's: logits, weights and ids of [T, E] tokens."""
    found: tuple[Tensor, Tensor, Tensor] = self._glm5_hal(x.view(-1, x.shape[-1]))
    return found


def mlp(self: Any, x: Tensor) -> Tensor:
    """In place of an MLP's: [..., E]."""
    out: Tensor = self._glm5_hal(x)
    return out


def norm(self: Any, x: Tensor) -> Tensor:
    """In place of the last norm's: [..., E]."""
    out: Tensor = ops.rms_norm(x, self.weight, eps=self._glm5_hal)
    return out


def prepare_cache(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """In place of a causal model's `_prepare_cache_for_generation`: `generate` gets a PagedCache where it makes one."""
    on_operators = "_glm5_hal" in self.model.__dict__  # `remove` may have been called on the decoder alone
    kind = generation_config.cache_implementation
    if on_operators and kind not in (None, "dynamic"):
        refuse(
            "CONFIG",
            f"cache_implementation={kind!r}: the operators write a PagedCache",
            value=kind,
            fix="leave it out; PagedCache(model, batch_size=..., max_length=...) reserves room",
        )
    fresh = model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False
    if on_operators and fresh:
        model_kwargs["past_key_values"] = PagedCache(self)
        return
    type(self)._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
