"""With guesses the result is what it is without, and as much faster as they are right."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from small import KINDS, TOP_K, model, tokens
from torch import Tensor

from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import Mtp, apply, remove, speculate

# The submodule, whose name the function took.
speculating = __import__("sys").modules["glm5_hal.integrations.transformers.speculate"]

LENGTHS, COLUMNS, NEW = (29, 7, 40), 40, 24
LEFT = torch.stack([torch.arange(COLUMNS) >= COLUMNS - n for n in LENGTHS]).long()
RIGHT = LEFT.flip(1)
HOLES = RIGHT.clone()
HOLES[2, 3:9] = 0


def pair(kind: str, seed: int = 0, noise: float = 0.0, **changes: Any) -> tuple[Any, Mtp]:
    """A model that says what comes next from the last token alone, and a draft layer that says the same of the token
    it is given. With ``noise`` all layers of either add something of their own, and they agree now and then."""
    small = model(kind, seed, **changes)
    with torch.no_grad():
        for name, parameter in small.model.layers.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter *= noise
    mtp = Mtp(apply(small))
    with torch.no_grad():
        for name, parameter in mtp.layer.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter *= 10 * noise  # beside an embedding that was normed
        mtp.eh_proj.weight.copy_(torch.cat([torch.eye(64), torch.zeros(64, 64)], 1))
        mtp.norm.weight.copy_(small.model.norm.weight)
    mtp.derive()
    return small, mtp


def strangers(kind: str, seed: int = 0, **changes: Any) -> tuple[Any, Mtp]:
    """A random model and a random draft layer: hardly a guess is right."""
    small = apply(model(kind, seed, **changes))
    torch.manual_seed(100 + seed)
    return small, Mtp(small)


@torch.no_grad()
def plain(small: Any, ids: Tensor, mask: Tensor | None = None, new: int = NEW) -> Tensor:
    """Each row's greedy tokens, alone and without padding: [B, new]."""
    mask = torch.ones_like(ids) if mask is None else mask
    made = []
    for row, real in zip(ids, mask.bool(), strict=True):
        prompt = row[real][None]
        made.append(small.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False))
    return torch.stack([row[0, -new:] for row in made])


# Greedy


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_without_guesses(kind: str, k: int) -> None:
    small, mtp = pair(kind, seed=k, noise=0.03)
    ids = tokens(2, COLUMNS, seed=k)
    found = speculate(small, mtp, ids, max_new_tokens=NEW, num_draft_tokens=k)
    assert torch.equal(found.sequences[:, :COLUMNS], ids)
    assert torch.equal(found.sequences[:, COLUMNS:], plain(small, ids))
    assert found.lengths == (NEW, NEW)
    assert 0.05 < found.acceptance < 0.9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers_alone(kind: str, seed: int) -> None:
    small, mtp = strangers(kind, seed)
    ids = tokens(2, COLUMNS, seed)
    found = speculate(small, mtp, ids, max_new_tokens=NEW, num_draft_tokens=3)
    assert found.acceptance < 0.2
    assert torch.equal(found.sequences[:, COLUMNS:], plain(remove(small), ids))


@pytest.mark.parametrize("mask", [LEFT, RIGHT, HOLES], ids=["left", "right", "holes"])
@pytest.mark.parametrize("share", [False, True])
def test_requests_of_unequal_lengths_keep_unequal_numbers_of_guesses(
    mask: Tensor, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Top-k is passed by some in the prompt, by one on the way."""
    small, mtp = pair("shared", seed=3, noise=0.03, index_share_for_mtp_iteration=share)
    ids, kept, accept = tokens(3, COLUMNS, seed=3), [], speculating.accept

    def watched(*args: Any) -> Any:
        kept.append((out := accept(*args))[1].tolist())
        return out

    monkeypatch.setattr(speculating, "accept", watched)
    found = speculate(small, mtp, ids, attention_mask=mask, max_new_tokens=NEW, num_draft_tokens=3)
    assert torch.equal(found.sequences[:, COLUMNS:], plain(small, ids, mask))
    assert any(len({*row}) > 1 for row in kept)
    assert {n for row in kept for n in row} == {0, 1, 2, 3}
    assert min(LENGTHS) < TOP_K < min(LENGTHS) + NEW
    assert len({len(row) for row in kept}) > 1  # who is done leaves the batch


@pytest.mark.parametrize("page_size", [1, 8])
def test_pages_of_any_size(page_size: int) -> None:
    small, mtp = pair("glm", seed=1, noise=0.03)
    ids = tokens(3, COLUMNS, seed=1)
    expected = plain(small, ids, LEFT)
    apply(small, page_size=page_size)
    weights = mtp.state_dict()
    mtp = Mtp(small, weights)
    found = speculate(small, mtp, ids, attention_mask=LEFT, max_new_tokens=NEW)
    assert torch.equal(found.sequences[:, COLUMNS:], expected)


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5])
def test_no_more_tokens_are_made_than_asked_for(new: int) -> None:
    small, mtp = pair("glm")
    ids = tokens(2, COLUMNS)
    found = speculate(small, mtp, ids, max_new_tokens=new, num_draft_tokens=3)
    assert torch.equal(found.sequences[:, COLUMNS:], plain(small, ids, new=new))
    assert found.lengths == (new, new)


def test_a_row_ends_at_its_first_eos_and_is_filled_up() -> None:
    small, mtp = pair("glm", noise=0.03)
    ids = tokens(3, COLUMNS)
    expected = plain(small, ids)
    eos = [int(expected[0, 5]), int(expected[1, 10])]
    ends = [next((i + 1 for i, t in enumerate(row) if t in eos), NEW) for row in expected.tolist()]
    assert len({*ends}) > 1
    found = speculate(small, mtp, ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=96)
    assert found.lengths == tuple(ends)
    for row, text, n in zip(found.sequences[:, COLUMNS:], expected, ends, strict=True):
        assert torch.equal(row[:n], text[:n])
        assert (row[n:] == 96).all()
    small.generation_config.eos_token_id = eos
    again = speculate(small, mtp, ids, max_new_tokens=NEW)
    assert again.lengths == found.lengths
    assert again.sequences[ends.index(min(ends)), -1] == eos[0]  # pads with the first eos


# Acceptance


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("kind", "share"), [("glm", False), ("shared", True), ("deepseek", False)])
def test_a_draft_layer_that_knows_the_model_is_always_right(kind: str, share: bool, sampled: bool) -> None:
    small, mtp = pair(kind, index_share_for_mtp_iteration=share)
    found = speculate(
        small, mtp, tokens(3, COLUMNS), attention_mask=LEFT, max_new_tokens=NEW + 1, num_draft_tokens=3,
        do_sample=sampled, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found.acceptance == 1.0
    assert found.accept_length == 4.0
    assert found.guessed == found.kept == (3 * NEW // 4,) * 3
    assert found.passes == 1 + NEW // 4


def test_statistics_are_by_place_in_the_round() -> None:
    small, mtp = pair("glm", seed=2, noise=0.03)
    found = speculate(small, mtp, tokens(2, COLUMNS, 2), max_new_tokens=NEW, num_draft_tokens=4)
    assert found.guessed[0] >= found.guessed[3] > 0
    assert found.kept[0] >= found.kept[1] >= found.kept[2] >= found.kept[3]
    assert found.acceptance == sum(found.kept) / sum(found.guessed)
    assert found.passes < NEW


@pytest.mark.parametrize("mask", [LEFT, RIGHT, HOLES], ids=["left", "right", "holes"])
def test_the_draft_layer_sees_every_token_with_the_models_hidden_state_before_it(
    mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round by round and whatever was guessed: t_{i+1} beside h_i, for all but the last round's tokens."""
    small, mtp = pair("shared", seed=3, noise=0.03)
    ids, guess = tokens(3, COLUMNS, seed=3), speculating.guess
    seen: list[list[tuple[Tensor, Tensor]]] = [[], [], []]

    def watched(mtp: Mtp, new: Any, *args: Any) -> Any:
        if len(new.ids) == 3:
            for row, *given in zip(seen, new.ids, new.hidden, new.real, strict=True):
                row.append((given[0][given[2]], given[1][given[2]]))
        return guess(mtp, new, *args)

    monkeypatch.setattr(speculating, "guess", watched)
    found = speculate(small, mtp, ids, attention_mask=mask, max_new_tokens=NEW)
    for row, prompt, real, made in zip(seen, ids, mask.bool(), found.sequences[:, COLUMNS:], strict=True):
        text, (given, hidden) = torch.cat([prompt[real], made]), (torch.cat(x) for x in zip(*row, strict=True))
        assert len(given) > real.sum() + 8
        assert torch.equal(given, text[1 : len(given) + 1])
        with torch.no_grad():
            expected = small.model(text[None, : len(given)]).last_hidden_state[0]
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [False, True])
def test_hidden_states_are_passed_on_as_agreed(share: bool) -> None:
    """A draft layer that looks at nothing but the hidden state is always right if it gets the model's after its last
    norm, and its own after its norm: what both norms multiply with is what head and hnorm expect."""
    small, mtp = counting(share)
    ids = torch.tensor([[5, 6, 7], [40, 41, 42]])
    found = speculate(small, mtp, ids, max_new_tokens=13, num_draft_tokens=3)
    assert found.sequences.tolist() == [list(range(5, 21)), list(range(40, 56))]
    assert found.acceptance == 1.0


def counting(share: bool) -> tuple[Any, Mtp]:
    """Model and draft layer count: after token t comes t + 1. Token t is an angle t·m·w in each of 32 planes m; the
    head reads one token ahead, and eh_proj turns the hidden state on by one."""
    small = model("shared", index_share_for_mtp_iteration=share)
    angles = torch.arange(97)[:, None] * torch.arange(1, 33) * (2 * torch.pi / 97)
    code = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
    turn = torch.block_diag(*(torch.tensor([[c, -s], [s, c]]) for c, s in code[1].view(32, 2).tolist()))
    signs = torch.randint(2, (32,), generator=torch.Generator().manual_seed(0)).mul(2.0).sub(1.0).repeat_interleave(2)
    mtp = Mtp(apply(small))
    with torch.no_grad():
        for name, parameter in [*small.model.layers.named_parameters(), *mtp.layer.named_parameters()]:
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        small.model.embed_tokens.weight.copy_(code)
        small.lm_head.weight.copy_(signs * code.roll(1, 0))
        for norm in (small.model.norm, mtp.norm, mtp.hnorm):
            norm.weight.copy_(signs)
        mtp.eh_proj.weight.copy_(torch.cat([torch.zeros(64, 64), turn], 1))
    apply(small)
    mtp.derive()
    return small, mtp


# Sampling

VOCAB, ROWS, SIGMAS = 3, 2000, 4.5


def surprise(counts: Tensor, expected: Tensor) -> float:
    """By how many standard deviations a chi-square statistic is off its mean; cells that expect few are one cell."""
    few = expected < 5
    if few.any():
        counts, expected = (torch.cat([x[~few], x[few].sum()[None]]) for x in (counts, expected))
    chi, df = ((counts - expected).square() / expected).sum(), len(expected) - 1
    return float((chi - df) / (2 * df) ** 0.5)


@torch.no_grad()
def joint(small: Any, prompt: Tensor, n: int, temperature: float) -> Tensor:
    """Probabilities of all texts of n tokens, [VOCAB^n], by transformers' own eager model."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=n)))
    logits = small(torch.cat([prompt.expand(len(texts), -1), texts], 1)).logits[:, -n - 1 : -1].double()
    return (logits / temperature).softmax(-1).gather(-1, texts[..., None]).prod(1)[:, 0]


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (2, 0.6), (3, 1.0)])
def test_sampled_texts_have_exactly_the_models_distribution(k: int, temperature: float) -> None:
    small, mtp = strangers("glm", 1, vocab_size=VOCAB, num_hidden_layers=2, indexer_types=["full"] * 2)
    prompt, n = torch.tensor([[1, 0, 0, 2]]), k + 2  # a whole round after the prompt's token
    found = speculate(
        small, mtp, prompt.expand(ROWS, -1), max_new_tokens=n, num_draft_tokens=k, do_sample=True,
        temperature=temperature, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    cells = (found.sequences[:, -n:] * VOCAB ** torch.arange(n - 1, -1, -1)).sum(1)
    counts = torch.bincount(cells, minlength=VOCAB**n)
    expected = ROWS * joint(remove(small), prompt, n, temperature)
    assert found.kept[-1] > 0
    assert found.kept[0] < found.guessed[0]
    assert abs(surprise(counts, expected)) < SIGMAS
    for other in (joint(small, prompt.roll(1), n, temperature), joint(small, prompt, n, 0.7 * temperature)):
        assert surprise(counts, ROWS * other) > 2 * SIGMAS


def test_a_generator_decides_everything_and_greedy_touches_none() -> None:
    small, mtp = pair("glm", noise=0.03)

    def drawn(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return speculate(small, mtp, tokens(2, 9), max_new_tokens=9, do_sample=True, generator=generator).sequences

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    before = torch.get_rng_state()
    speculate(small, mtp, tokens(2, 9), max_new_tokens=9)
    assert torch.equal(torch.get_rng_state(), before)


# What it refuses


@pytest.mark.parametrize(
    ("kwargs", "code"),
    [
        ({"max_new_tokens": 0}, "SCALAR"),
        ({"num_draft_tokens": 0}, "SCALAR"),
        ({"do_sample": True, "temperature": 0.0}, "SCALAR"),
        ({"attention_mask": torch.ones(2, 8)}, "SHAPE"),
        ({"attention_mask": torch.ones(9)}, "SHAPE"),
        ({"attention_mask": torch.arange(2)[:, None].expand(2, 9)}, "VALUE"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any], code: str) -> None:
    small, mtp = strangers("glm")
    with pytest.raises(HalError) as found:
        speculate(small, mtp, tokens(2, 9), **kwargs)
    assert found.value.code == code
    assert found.value.fix


def test_a_draft_layer_of_another_model_and_a_model_without_operators_are_refused() -> None:
    small, mtp = strangers("glm")
    for call in (
        lambda: speculate(strangers("glm")[0], mtp, tokens(1, 4)),
        lambda: speculate(remove(small), mtp, tokens(1, 4)),
    ):
        with pytest.raises(HalError) as found:
            call()
        assert found.value.code == "CONTRACT"
