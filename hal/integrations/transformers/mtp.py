"""The draft layer of a checkpoint (multi-token prediction), which transformers leaves out, over the operators.

It guesses the token after the next one: from a position's hidden state h_i and the next token t_{i+1},

    g_i = norm(layer(eh_proj(enorm(embed(t_{i+1})) ⊕ hnorm(h_i)))),    the embedding first
    logits of t_{i+2} = lm_head(g_i)

where ``layer`` is a whole decoder layer with its own indexer and caches, and embedding and head are the model's (spec
section 5.3). The hidden-state contract, on which the guesses' quality depends though never the result:

- where the model has been, h_i is its hidden state after its last norm;
- further guesses take g_i, also after its norm, for h_{i+1}.

Legend: B rows, S columns, T real tokens, E hidden size, K top-k.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glm5_hal import ops
from glm5_hal.integrations.transformers import checks, forwards, models
from glm5_hal.integrations.transformers.cache import PagedCache
from glm5_hal.integrations.transformers.sources import check_unchanged, sources
from glm5_hal.integrations.transformers.step import Step, active
from glm5_hal.ops._common.products import linear


class Mtp(nn.Module):
    """The draft layer of a model that `apply` was called on.

    Args:
        model: a causal GLM-5 or DeepSeek-V3.2 model. Its embedding, head and rotary tables serve both.
        weights: by this module's names, plain and floating; None draws them as transformers does for a new model.
            `load_mtp` reads a checkpoint's.

    Attributes:
        enorm, hnorm, eh_proj, layer, norm: the weights; ``norm`` is what checkpoints call shared_head.norm.
        share_index: whether guesses after a round's first attend to the keys that the first chose (GLM-5.2).

    Raises:
        HalError: CONTRACT if `apply` was not called, TYPE for a bare decoder, CONFIG where weights are missing, unknown
            or of another shape.
    """

    model: Any

    def __init__(self, model: Any, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        decoder, layout = models.decoder_of(model), models.applied(model).layout
        if not hasattr(model, "lm_head"):
            checks.refuse(
                "TYPE",
                f"{type(model).__name__} has no head, which the draft layer shares",
                value=type(model).__name__,
                fix="pass the causal model, not its inner decoder",
            )
        config, last = _extended(decoder.config), decoder.layers[-1]
        norm, E, eps = type(last.input_layernorm), config.hidden_size, config.rms_norm_eps
        with torch.device("meta" if weights is not None else layout.device):
            self.enorm, self.hnorm, self.norm = (norm(E, eps) for _ in range(3))
            self.eh_proj = nn.Linear(2 * E, E, bias=False)
            self.layer = type(last)(config, config.num_hidden_layers - 1)
        if weights is None:
            for module in self.modules():
                decoder._init_weights(module)
            weights = self.state_dict()
        self._take(weights, decoder)
        self.__dict__["model"] = model  # beside the modules: its weights are not the draft layer's
        self.layout = replace(layout, indexed=(True,))
        self.share_index = bool(getattr(config, "index_share_for_mtp_iteration", False))
        self.requires_grad_(False).eval()
        self.derive()

    def _take(self, weights: Mapping[str, Tensor], decoder: Any) -> None:
        """The weights become this module's own, each in the dtype that the model has the same one in."""
        wanted = {name: tensor.shape for name, tensor in self.state_dict().items()}
        wrong = {name: tuple(t.shape) for name, t in weights.items() if wanted.get(name, t.shape) != t.shape}
        for what, names in (
            ("missing", wanted.keys() - weights.keys()),
            ("unknown", weights.keys() - wanted.keys()),
            ("of another shape than the model's configuration says", wrong),
        ):
            if names:
                checks.refuse(
                    "CONFIG",
                    f"weights of the draft layer are {what}: {checks.listing(names)}",
                    value=sorted(names),
                    fix="load the checkpoint that the model itself came from",
                )
        norm = decoder.norm.weight
        held = {n: t.dtype for layer in decoder.layers for n, t in layer.state_dict(prefix="layer.").items()}
        with torch.inference_mode(False):
            made = {n: t.to(norm.device, held.get(n, norm.dtype)) for n, t in weights.items()}
            self.load_state_dict(made, assign=True)

    def derive(self) -> None:
        """Make the weights that the operators take. Call it again after changing the layer's own."""
        decoder = models.decoder_of(self.model)
        checks.plain("layer", self.layer, like=decoder)
        models.install(self.layer, 0, decoder)
        self._sources = tuple(sources("layer", self.layer))

    def cache(self) -> PagedCache:
        """An empty cache of the draft layer's latents and index keys."""
        return PagedCache(self.layout)

    def forward(
        self,
        ids: Tensor,
        hidden: Tensor,
        *,
        cache: PagedCache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        chosen: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """g of every position, by the formula above, and the keys that each row's last token attended to.

        Args:
            ids: [B, S] int64: the token after each position's.
            hidden: [B, S, E]: h of each position.
            cache: of the draft layer; it is written and advanced.
            attention_mask: [B, seen + S], nonzero for real tokens; None where there is no padding. Every row has at
                least one real token among the new ones.
            position_ids: [B, S] or [1, S]; None counts columns.
            chosen, reuse: whether to attend to this earlier choice, [B, K] int32 or None for all keys, instead of
                choosing anew. Keys that came since fill its empty places (-1). Only with S = 1.

        Returns:
            g, [B, S, E], meaningless for padding, and the choice: [B, K] int32, None if it was all keys.

        Raises:
            HalError: CONTRACT where weights changed since `derive`; what `PagedCache.step` raises.
        """
        check_unchanged(self._sources, again="mtp.derive()")
        (B, S), decoder = ids.shape, models.decoder_of(self.model)
        embedded = ops.rms_norm(decoder.embed_tokens(ids), self.enorm.weight, eps=self.enorm.variance_epsilon)
        x = torch.cat([embedded, ops.rms_norm(hidden, self.hnorm.weight, eps=self.hnorm.variance_epsilon)], -1)
        at = forwards.begin(decoder.rotary_emb, cache, B, S, checks.mask(attention_mask), position_ids)
        if reuse:
            at, chosen = replace(at, reuse=True), _extend(chosen, at.step, decoder.config.index_topk)
        with active(at.step):
            x, chosen = self.layer(linear(x, self.eh_proj.weight), at=at, chosen=chosen)
        cache.advance(at.step)
        g = ops.rms_norm(x, self.norm.weight, eps=self.norm.variance_epsilon)
        return g, None if chosen is None else chosen[at.step.cu_seqlens_q[1:].long() - 1]

    def logits(self, g: Tensor) -> Tensor:
        """[..., E] to [..., V]."""
        out: Tensor = self.model.lm_head(g)
        return out


def _extended(config: Any) -> Any:
    """The configuration with one more layer: a mixture of experts with its own indexer, whatever the others have."""
    config = copy.deepcopy(config)
    config.num_hidden_layers += 1
    config.mlp_layer_types = [*config.mlp_layer_types, "sparse"]
    if hasattr(config, "indexer_types"):
        config.indexer_types = [*config.indexer_types, "full"]
    return config


def _extend(chosen: Tensor | None, step: Step, top_k: int) -> Tensor:
    """[B, K]: the choice, where it had room for all keys also with the keys since."""
    columns = torch.arange(top_k, dtype=torch.int32, device=step.seq_lens.device)
    if chosen is None:
        chosen = columns.new_full((len(step.seq_lens), top_k), -1)
    return torch.where((chosen < 0) & (columns < step.seq_lens[:, None]), columns, chosen)
