"""Speculative decoding with the draft layer: several tokens per pass of the model, and the same result.

A round guesses k tokens, lets the model judge them in one pass, and keeps, request by request, the first ones that
`accept` lets through and one more. What a request has not kept leaves the caches again: each has a length of its own.

Legend: B requests that still run, S columns, k guesses, V vocabulary, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glm5_hal.integrations.transformers import models
from glm5_hal.integrations.transformers.cache import PagedCache
from glm5_hal.integrations.transformers.checks import refuse
from glm5_hal.integrations.transformers.mtp import Mtp
from glm5_hal.integrations.transformers.sampling import Sampler, accept


@dataclass(frozen=True)
class Speculated:
    """What `speculate` made.

    Attributes:
        sequences: the prompts as they were given and the new tokens, [B, S + N] int64; shorter rows end in padding.
        lengths: new tokens of each row.
        passes: of the model over the batch, the prompt's included.
        guessed, kept: by place in a round, how many guesses were made and how many were kept, all rows together.
    """

    sequences: Tensor
    lengths: tuple[int, ...]
    passes: int
    guessed: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def acceptance(self) -> float:
        """The part of all guesses that was kept; 0 if there were none."""
        return sum(self.kept) / max(sum(self.guessed), 1)

    @property
    def accept_length(self) -> float:
        """Tokens per request and round, the one that the model adds included; 1 if there were no guesses."""
        return 1 + sum(self.kept) / max(self.guessed[0], 1)


@dataclass(frozen=True, eq=False)
class Fresh:
    """What the model has computed and the draft layer has not seen.

    Attributes:
        ids: the token after each position, [B, S].
        hidden: the model's hidden state after its last norm, [B, S, E].
        real: [B, S] bool; every row has one.
    """

    ids: Tensor
    hidden: Tensor
    real: Tensor

    def last(self, x: Tensor) -> Tensor:
        """Each row's last real place in ``x [B, S, ...]``: [B, ...]."""
        S = self.real.shape[1]
        place = (torch.arange(S, device=x.device) * self.real).argmax(1)
        return x[torch.arange(len(x), device=x.device), place]


@torch.no_grad()
def speculate(
    model: Any,
    mtp: Mtp,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    num_draft_tokens: int = 3,
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Speculated:
    """Generate with the draft layer's guesses.

    Greedy decoding gives the tokens that the model's logits demand; those of a pass over several tokens may differ in
    their last bits from those of one token at a time (unless the backend's kernels are batch invariant), so where two
    tokens tie to within rounding it may take the other one. Sampling gives tokens of exactly the model's distribution.

    Args:
        model: the causal model that `apply` was called on, and that ``mtp`` was made for.
        mtp: its draft layer.
        input_ids: [B, S] int64, with padding on either side or none.
        attention_mask: [B, S], nonzero for real tokens; None where there is no padding.
        max_new_tokens: for each row.
        num_draft_tokens: guesses per round, k. 3 or 4 suit the published weights.
        do_sample: draw from the distribution at ``temperature``; else take the most probable token.
        generator: of the draws, on the model's device. The same one gives the same tokens.
        eos_token_id: after which a row ends; None is what the model's generation config says.
        pad_token_id: fills rows that end early; None is the generation config's, else the first eos, else 0.

    Raises:
        HalError: SHAPE, SCALAR or VALUE for arguments out of range, CONTRACT for a draft layer of another model, and
            what the model's own pass raises.
    """
    mask = _checked(model, mtp, input_ids, attention_mask)
    _check_scalars(max_new_tokens, num_draft_tokens, temperature if do_sample else 1.0)
    sampler = Sampler(temperature if do_sample else 0.0, generator)
    eos, pad = _special(model, eos_token_id, pad_token_id)
    texts: list[list[int]] = [[] for _ in input_ids]
    guessed, kept, passes = [0] * num_draft_tokens, [0] * num_draft_tokens, 1

    target, drafts = PagedCache(model), mtp.cache()
    hidden = _hidden(model, input_ids, target, mask)
    new = Fresh(input_ids, hidden, mask)
    token = sampler.draw(sampler.probabilities(model.lm_head(new.last(hidden))))
    new, rows = replace(new, ids=_followed(input_ids, mask, token)), list(range(len(texts)))
    _append(texts, rows, token[:, None].tolist(), [1] * len(rows), eos)
    while True:
        going = [i for i, r in enumerate(rows) if len(texts[r]) < max_new_tokens and texts[r][-1] not in eos]
        if not going:
            break
        if len(going) < len(rows):
            rows, places = [rows[i] for i in going], torch.tensor(going, device=mask.device)
            new = Fresh(new.ids[places], new.hidden[places], new.real[places])
            for cache in (target, drafts):
                cache.batch_select_indices(places)
        k = min(num_draft_tokens, max(max_new_tokens - len(texts[r]) for r in rows) - 1)
        seen = target.mask.sum(1)
        guesses, q = guess(mtp, new, drafts, k, sampler)
        ids = torch.cat([new.last(new.ids)[:, None], guesses], 1)
        hidden = _hidden(model, ids, target, torch.ones_like(ids, dtype=torch.bool))
        tokens, taken = accept(sampler.probabilities(model.lm_head(hidden)), q, guesses, sampler)
        target.crop_rows(seen + 1 + taken)
        counts = [1 + n for n in taken.tolist()]
        _append(texts, rows, tokens.tolist(), counts, eos)
        S = max(counts)
        new = Fresh(tokens[:, :S], hidden[:, :S], torch.arange(S, device=mask.device) <= taken[:, None])
        passes += 1
        for j in range(k):
            guessed[j] += len(rows)
            kept[j] += sum(n > j + 1 for n in counts)
    made = _padded([text[:max_new_tokens] for text in texts], pad, like=input_ids)
    lengths = tuple(min(len(text), max_new_tokens) for text in texts)
    return Speculated(torch.cat([input_ids, made], 1), lengths, passes, tuple(guessed), tuple(kept))


def guess(mtp: Mtp, new: Fresh, cache: PagedCache, k: int, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """k guesses after the last of ``new.ids``: [B, k], and what each was drawn from, [B, k, V].

    The cache then holds what the model has computed and nothing that was only guessed.
    """
    if not k:  # one token is left to make, and the model makes it
        return new.ids[:, :0], new.hidden.new_empty(len(new.ids), 0, mtp.model.config.vocab_size)
    g, chosen = mtp(new.ids, new.hidden, cache=cache, **_places(cache, new.real))
    g, seen, one = new.last(g), cache.mask.sum(1), torch.ones_like(new.real[:, :1])
    tokens: list[Tensor] = []
    chances: list[Tensor] = []
    for j in range(k):
        if j:
            again = {"chosen": chosen, "reuse": mtp.share_index, **_places(cache, one)}
            g = mtp(tokens[-1][:, None], g[:, None], cache=cache, **again)[0][:, 0]
        chances.append(sampler.probabilities(mtp.logits(g)))
        tokens.append(sampler.draw(chances[-1]))
    cache.crop_rows(seen)
    return torch.stack(tokens, 1), torch.stack(chances, 1)


def _hidden(model: Any, ids: Tensor, cache: PagedCache, real: Tensor) -> Tensor:
    """The model's hidden states after its last norm: [B, S, E]."""
    out: Tensor = models.decoder_of(model)(ids, past_key_values=cache, **_places(cache, real)).last_hidden_state
    return out


def _places(cache: PagedCache, real: Tensor) -> dict[str, Tensor]:
    """Mask and positions of a pass whose new columns are ``real [B, S]``."""
    mask = torch.cat([cache.mask, real], 1) if cache.seen else real
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -real.shape[1] :]}


def _followed(ids: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """[B, S]: the real token after each real one, and ``token [B]`` after a row's last."""
    following = ids[mask].roll(-1)
    following[mask.sum(1).cumsum(0) - 1] = token
    return ids.masked_scatter(mask, following)


def _append(texts: list[list[int]], rows: list[int], tokens: list[list[int]], counts: list[int], eos: set[int]) -> None:
    """Add each row's first ``counts`` tokens to its text, up to an eos."""
    for r, made, count in zip(rows, tokens, counts, strict=True):
        ends = [i + 1 for i, token in enumerate(made[:count]) if token in eos]
        texts[r] += made[: min([count, *ends])]


def _padded(texts: list[list[int]], pad: int, like: Tensor) -> Tensor:
    width = max(map(len, texts))
    return torch.tensor([text + [pad] * (width - len(text)) for text in texts], dtype=like.dtype, device=like.device)


# --- arguments -------------------------------------------------------------------------------------------------------


def _checked(model: Any, mtp: Mtp, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The prompt's real tokens, [B, S] bool."""
    if mtp.model is not model:
        refuse("CONTRACT", "the draft layer was made for another model", fix="make one: Mtp(model) or load_mtp(...)")
    models.applied(model)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.dim() != 2 or mask.shape != input_ids.shape:
        refuse(
            "SHAPE",
            f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(mask.shape)} must both be [batch, columns]",
            value=(tuple(input_ids.shape), tuple(mask.shape)),
            fix="pass a batch of prompts and the 2D mask of their real tokens",
        )
    mask = mask.to(device=input_ids.device, dtype=torch.bool)
    empty = (~mask.any(1)).nonzero()[:, 0].tolist()
    if empty or not len(mask):
        refuse("VALUE", f"prompts {empty} have no token", value=empty, fix="give every prompt one, bos for example")
    return mask


def _check_scalars(max_new_tokens: int, num_draft_tokens: int, temperature: float) -> None:
    for name, value, fits in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("num_draft_tokens", num_draft_tokens, num_draft_tokens >= 1),
        ("temperature", temperature, 0 < temperature < float("inf")),
    ):
        if not fits:
            fix = "do_sample=False is greedy" if name == "temperature" else "model.generate does without guesses"
            refuse("SCALAR", f"{name}={value} must be positive", value=value, fix=fix)


def _special(model: Any, eos: int | Sequence[int] | None, pad: int | None) -> tuple[set[int], int]:
    """Tokens that end a row, and the one that fills it up."""
    said = model.generation_config
    eos = said.eos_token_id if eos is None else eos
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = said.pad_token_id if pad is None else pad
    return set(ends), pad if pad is not None else ends[0] if ends else 0
