"""The draft layer computes what spec section 5.3 says, and nothing near it.

The reference is written from that section around transformers' own decoder layer: no cache, the whole sequence again
for every guess.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import KINDS, TOP_K, gaps, model, tokens
from torch import Tensor

from glm5_hal import ops
from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import Mtp, PagedCache, apply
from glm5_hal.integrations.transformers.sampling import Sampler
from glm5_hal.integrations.transformers.speculate import Fresh, guess

#: Prompts of more tokens than top-k, then guesses.
PROMPT, GUESSES = 40, 4

#: How far off the wrong ones are at least, where the right one is within 1e-4.
WRONG = 1e-2

#: Seeds whose k-th and next score are at least GAP of the largest apart in every row that the draft layer chooses for.
GAP = 1e-5
SEEDS = [("glm", 0), ("glm", 1), ("shared", 0), ("shared", 1), ("deepseek", 0), ("deepseek", 1)]


def made(kind: str, seed: int = 0, **changes: Any) -> tuple[Any, Mtp]:
    """A model that runs on the operators and a draft layer whose gains and biases are random too."""
    small = apply(model(kind, seed, **changes))
    torch.manual_seed(100 + seed)
    mtp = Mtp(small)
    with torch.no_grad():
        for name, tensor in [*mtp.named_parameters(), *mtp.named_buffers()]:
            if "norm" in name or name.endswith("e_score_correction_bias"):
                tensor += 0.2 * torch.randn_like(tensor)
    mtp.derive()
    return small, mtp


class Reference:
    """Spec 5.3 over transformers' decoder layer. Options are the mistakes that others made.

    Args:
        order: of the concatenation.
        recycled: what a guess after the first takes for the hidden state.
        choice: whose keys guesses after the first attend to.
    """

    def __init__(
        self, small: Any, mtp: Mtp, *, order: str = "embedding first", recycled: str = "g", choice: str = "own"
    ) -> None:
        self.main, self.order, self.recycled, self.choice = small.model, order, recycled, choice
        self.head, self.weights = small.lm_head.weight, mtp.state_dict()
        config = copy.deepcopy(small.config)
        config.indexer_types = ["full"] * (config.num_hidden_layers + 1)
        config.mlp_layer_types = ["sparse"] * (config.num_hidden_layers + 1)
        config._attn_implementation = config._experts_implementation = "eager"
        self.layer = type(self.main.layers[0])(config, config.num_hidden_layers).eval()
        self.layer.load_state_dict({n[6:]: w for n, w in self.weights.items() if n.startswith("layer.")})
        self.indexer, self.layer.self_attn.indexer.forward = self.layer.self_attn.indexer.forward, self._indexer
        self.eps, self.chosen, self.first = config.rms_norm_eps, None, 0

    def _indexer(self, *args: Any, **kwargs: Any) -> Tensor:
        """Rows from ``first`` on attend to what was chosen for the row before them."""
        found: Tensor = self.indexer(*args, **kwargs).clone()
        if self.first:
            found[:, self.first :] = self.chosen[:, None]
        else:
            self.chosen = found[:, -1]
        return found

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weights[f"{name}.weight"]

    def __call__(self, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's result before and after its norm, [B, S, E]; ``ids`` are one ahead of ``hidden``."""
        parts = [self.norm(self.main.embed_tokens(ids), "enorm"), self.norm(hidden, "hnorm")]
        parts = parts if self.order == "embedding first" else parts[::-1]
        x, S = torch.cat(parts, -1) @ self.weights["eh_proj.weight"].T, ids.shape[1]
        mask = torch.full((S, S), torch.finfo(x.dtype).min).triu(1)[None, None]
        at = torch.arange(S)[None]
        rope = self.main.rotary_emb(x, position_ids=at)
        out = self.layer(x, attention_mask=mask, position_ids=at, position_embeddings=rope)
        out = out[0] if isinstance(out, tuple) else out
        return out, self.norm(out, "norm")

    def guesses(self, ids: Tensor, hidden: Tensor, drawn: Tensor) -> Tensor:
        """Probabilities of each guess, [B, k, V], if ``drawn [B, k]`` are what was drawn."""
        found, self.first = [], 0
        for j in range(drawn.shape[1]):
            before, g = self(ids, hidden)
            found.append((g[:, -1] @ self.head.T).softmax(-1))
            if self.choice == "the first guess's" and not self.first:
                self.first = ids.shape[1]
            ids = torch.cat([ids, drawn[:, j : j + 1]], 1)
            hidden = torch.cat([hidden, (g if self.recycled == "g" else before)[:, -1:]], 1)
        return torch.stack(found, 1)


@torch.no_grad()
def prompt(small: Any, seed: int = 0, batch: int = 2, columns: int = PROMPT) -> Fresh:
    """What the model makes of a prompt, and a token after it."""
    ids = tokens(batch, columns + 1, seed)
    hidden = small.model(ids[:, :-1]).last_hidden_state
    return Fresh(ids[:, 1:], hidden, torch.ones(batch, columns, dtype=torch.bool))


@torch.no_grad()
def guessed(mtp: Mtp, new: Fresh, k: int = GUESSES, cache: PagedCache | None = None) -> tuple[Tensor, Tensor]:
    sampler = Sampler(1.0, torch.Generator().manual_seed(0))
    return guess(mtp, new, mtp.cache() if cache is None else cache, k, sampler)


def off(a: Tensor, b: Tensor) -> float:
    return float((a.log() - b.log()).abs().max())


# What it computes


@pytest.mark.parametrize(("kind", "seed"), SEEDS)
def test_after_the_model_it_is_within_1e_4_of_transformers_layer(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, mtp = made(kind, seed)
    new = prompt(small, seed)
    with torch.no_grad(), gaps(monkeypatch) as found:
        g, chosen = mtp(new.ids, new.hidden, cache=mtp.cache())
        expected = Reference(small, mtp)(new.ids, new.hidden)[1]
    assert len(found) == 2 * (PROMPT - TOP_K)
    assert min(found) > GAP
    assert chosen is not None
    assert chosen.shape == (2, TOP_K)
    torch.testing.assert_close(g, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "seed"), SEEDS)
def test_its_guesses_are_those_of_transformers_layer(kind: str, seed: int) -> None:
    small, mtp = made(kind, seed)
    new = prompt(small, seed)
    drawn, found = guessed(mtp, new)
    with torch.no_grad():
        assert off(found, Reference(small, mtp).guesses(new.ids, new.hidden, drawn)) < 1e-4


@pytest.mark.parametrize(("kind", "seed"), SEEDS)
def test_the_embedding_comes_first(kind: str, seed: int) -> None:
    small, mtp = made(kind, seed)
    new = prompt(small, seed)
    drawn, found = guessed(mtp, new)
    with torch.no_grad():
        wrong = Reference(small, mtp, order="hidden state first").guesses(new.ids, new.hidden, drawn)
    assert off(found[:, :1], wrong[:, :1]) > WRONG


@pytest.mark.parametrize(("kind", "seed"), SEEDS)
def test_what_is_recycled_is_after_the_norm(kind: str, seed: int) -> None:
    small, mtp = made(kind, seed)
    new = prompt(small, seed)
    drawn, found = guessed(mtp, new)
    with torch.no_grad():
        wrong = Reference(small, mtp, recycled="before the norm").guesses(new.ids, new.hidden, drawn)
    assert off(found[:, 0], wrong[:, 0]) < 1e-4
    assert off(found[:, 1], wrong[:, 1]) > WRONG


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_hidden_state_is_taken_after_its_last_norm(kind: str) -> None:
    """hnorm hides a factor, not a gain: the state before the last norm gives other guesses."""
    small, mtp = made(kind)
    new = prompt(small)
    with torch.no_grad():
        before = small.model(tokens(2, PROMPT + 1)[:, :-1], output_hidden_states=True).hidden_states
        assert torch.equal(before[-1], new.hidden)  # transformers' last one is after the norm
        raw = small.model.norm.weight.reciprocal() * new.hidden
        right, wrong = (mtp(new.ids, h, cache=mtp.cache())[0] for h in (new.hidden, raw))
    assert (right - wrong).abs().max() > WRONG


# Its indexer


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_glm_5_2_chooses_keys_once_a_round_and_glm_5_for_every_guess(seed: int) -> None:
    for share, choice, other in ((True, "the first guess's", "own"), (False, "own", "the first guess's")):
        small, mtp = made("shared", seed, index_share_for_mtp_iteration=share)
        new = prompt(small, seed)
        drawn, found = guessed(mtp, new)
        with torch.no_grad():
            right, wrong = (
                Reference(small, mtp, choice=c).guesses(new.ids, new.hidden, drawn) for c in (choice, other)
            )
        assert off(found, right) < 1e-4
        assert off(found[:, 0], wrong[:, 0]) < 1e-4
        assert off(found[:, 1:], wrong[:, 1:]) > WRONG


def test_only_a_configuration_that_says_so_shares_the_choice() -> None:
    assert not made("glm")[1].share_index
    assert not made("shared")[1].share_index
    assert made("shared", index_share_for_mtp_iteration=True)[1].share_index


@pytest.mark.parametrize("share", [False, True])
def test_it_has_an_indexer_where_the_models_last_layer_has_none_and_it_decides(share: bool) -> None:
    types = ["full", "shared", "shared", "shared"]
    small, mtp = made("shared", indexer_types=types, index_share_for_mtp_iteration=share)
    new, cache = prompt(small), mtp.cache()
    expected = guessed(mtp, new, cache=cache)[1]
    assert [tensor is not None for tensor in cache.index] == [True]
    with torch.no_grad():
        mtp.layer.self_attn.indexer.wk.weight.copy_(torch.randn(mtp.layer.self_attn.indexer.wk.weight.shape))
    mtp.derive()
    assert off(guessed(mtp, new)[1][:, 0], expected[:, 0]) > WRONG


@pytest.mark.parametrize("columns", [PROMPT, TOP_K - 6], ids=["more keys than top-k", "fewer"])
def test_index_keys_are_written_also_where_nothing_is_chosen(columns: int) -> None:
    """For guesses that reuse a choice, and while all keys are attended to."""
    small, mtp = made("shared", index_share_for_mtp_iteration=True)
    new, held = prompt(small, columns=columns), []
    for reuse in (False, True):
        cache = mtp.cache()
        with torch.no_grad():
            g, chosen = mtp(new.ids, new.hidden, cache=cache)
            mtp(new.ids[:, -1:], g[:, -1:], cache=cache, chosen=chosen, reuse=reuse)
        pages = cache.index[0][cache.block_table.long()].flatten(1, 2)
        held.append(pages[:, : columns + 1])
    assert held[0].abs().amax(-1).min() > 0
    torch.testing.assert_close(*held, atol=1e-5, rtol=0)


def test_a_reused_choice_that_had_room_for_all_keys_takes_in_those_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a request does not depend on what it is batched with. One that was full stays as it was."""
    small, mtp = made("shared", index_share_for_mtp_iteration=True)
    lengths, seen, sparse = (PROMPT, TOP_K - 2, 5), [], ops.sparse_mla

    def watched(q: Tensor, kv: Tensor, chosen: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(chosen)
        return sparse(q, kv, chosen, *args, **kwargs)

    ids = tokens(3, PROMPT + 1)
    mask = torch.arange(PROMPT) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        hidden = small.model(ids[:, :-1], attention_mask=mask).last_hidden_state
    new = Fresh(ids[:, 1:], hidden, mask)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "sparse_mla", watched)
        drawn, together = guessed(mtp, new)
    first, *later = seen
    rows = [torch.tensor(lengths).cumsum(0)[r] - 1 for r in range(3)]
    for j, chosen in enumerate(later, start=1):
        assert torch.equal(chosen[0], first[rows[0]])
        for r in (1, 2):
            keys = chosen[r][chosen[r] >= 0]
            assert sorted(keys.tolist()) == list(range(min(lengths[r] + j, TOP_K)))
    for r, n in enumerate(lengths):
        alone = Fresh(ids[r : r + 1, 1 : n + 1], hidden[r : r + 1, :n], mask[r : r + 1, :n])
        with torch.no_grad():
            sampler = _Forced(drawn[r : r + 1])
            found = guess(mtp, alone, mtp.cache(), GUESSES, sampler)[1]
        assert off(found, together[r : r + 1]) < 1e-4


class _Forced(Sampler):
    """Draws what it is told to."""

    def __init__(self, drawn: Tensor) -> None:
        super().__init__(1.0)
        self.__dict__["left"] = list(drawn.unbind(1))

    def draw(self, weights: Tensor) -> Tensor:
        token: Tensor = self.__dict__["left"].pop(0)
        return token


# Its cache


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_padding_give_what_the_whole_does(kind: str) -> None:
    small, mtp = made(kind)
    new = prompt(small, batch=3)
    with torch.no_grad():
        expected = mtp(new.ids, new.hidden, cache=mtp.cache())[0]
        cache = mtp.cache()
        parts = [
            mtp(new.ids[:, a:b], new.hidden[:, a:b], cache=cache)[0]
            for a, b in ((0, 7), (7, 25), (25, 26), (26, PROMPT))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=0)
        mask = torch.arange(PROMPT) < torch.tensor([PROMPT, 22, 9])[:, None]
        padded = mtp(new.ids, new.hidden, cache=mtp.cache(), attention_mask=mask)[0]
        torch.testing.assert_close(padded[mask], expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [False, True])
def test_after_a_round_its_cache_holds_what_the_model_computed_and_no_guess(share: bool) -> None:
    small, mtp = made("shared", index_share_for_mtp_iteration=share)
    new, cache = prompt(small), mtp.cache()
    guessed(mtp, Fresh(new.ids[:, :-3], new.hidden[:, :-3], new.real[:, :-3]), cache=cache)
    assert cache.get_seq_length() == PROMPT - 3
    found = guessed(mtp, Fresh(new.ids[:, -3:], new.hidden[:, -3:], new.real[:, -3:]), cache=cache)
    expected = guessed(mtp, new)
    assert torch.equal(found[0], expected[0])
    assert off(found[1], expected[1]) < 1e-4


# Its weights


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(HalError) as found:
        call(*args, **kwargs)
    assert found.value.fix
    return found.value.code


def test_it_shares_embedding_and_head_and_owns_the_rest() -> None:
    small, mtp = made("glm")
    names = {name.split(".")[0] for name in mtp.state_dict()}
    assert names == {"enorm", "hnorm", "eh_proj", "norm", "layer"}
    own = {p.data_ptr() for p in mtp.parameters()}
    assert not own & {p.data_ptr() for p in small.parameters()}
    assert mtp.eh_proj.weight.shape == (64, 128)
    assert [m.variance_epsilon for m in (mtp.enorm, mtp.hnorm, mtp.norm)] == [small.config.rms_norm_eps] * 3
    new = prompt(small)
    expected = guessed(mtp, new)[1]
    with torch.no_grad():
        small.lm_head.weight.mul_(0.5)
    assert off(guessed(mtp, new)[1], expected) > WRONG


def test_it_needs_the_model_on_the_operators_with_its_head() -> None:
    assert refused(Mtp, model("glm")) == "CONTRACT"
    assert refused(Mtp, apply(model("glm")).model) == "TYPE"


@pytest.mark.parametrize("change", ["written", "assigned"])
def test_weights_that_changed_since_they_were_derived_are_noticed(change: str) -> None:
    small, mtp = made("glm")
    new, kv_b = prompt(small), mtp.layer.self_attn.kv_b_proj
    if change == "written":
        with torch.no_grad():
            kv_b.weight.mul_(2)
    else:
        kv_b.load_state_dict({"weight": 2 * kv_b.weight}, assign=True)
    assert refused(mtp, new.ids, new.hidden, cache=mtp.cache()) == "CONTRACT"
    mtp.derive()
    with torch.no_grad():
        expected = Reference(small, mtp)(new.ids, new.hidden)[1]
        torch.testing.assert_close(mtp(new.ids, new.hidden, cache=mtp.cache())[0], expected, atol=1e-4, rtol=0)


def test_gradients_are_refused() -> None:
    small, mtp = made("glm")
    new = prompt(small)
    assert refused(mtp, new.ids, new.hidden.requires_grad_(), cache=mtp.cache()) == "GRAD"
