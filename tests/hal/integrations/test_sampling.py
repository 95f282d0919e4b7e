"""Tokens that pass `accept` are distributed as if nothing had been guessed, and a rule that is near it shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glm5_hal.integrations.transformers.sampling import Sampler, accept

V, ROWS = 4, 200_000

#: A chi-square this many standard deviations above its mean is no accident (normal approximation, many cells).
SIGMAS = 5.0


def chain(seed: int, sharpness: float = 1.0) -> Tensor:
    """Probabilities of the next token after each token, [V, V]."""
    return (sharpness * torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(
        -1
    )


def sampler(seed: int = 0) -> Sampler:
    return Sampler(1.0, torch.Generator().manual_seed(seed))


def surprise(texts: Tensor, p: Tensor) -> float:
    """By how many standard deviations the counts of ``texts [ROWS, n]`` are off the chain ``p`` that starts at 0."""
    expected, n = torch.ones(1, dtype=torch.float64), texts.shape[1]
    before = torch.zeros(1, dtype=torch.int64)
    for _ in range(n):
        expected, before = (expected[:, None] * p[before]).flatten(), torch.arange(V).repeat(len(before))
    cells = (texts * V ** torch.arange(n - 1, -1, -1)).sum(1)
    counts = torch.bincount(cells, minlength=V**n)
    chi = ((counts - ROWS * expected).square() / (ROWS * expected)).sum()
    df = V**n - 1
    return float((chi - df) / (2 * df) ** 0.5)


def texts(p: Tensor, q: Tensor, k: int, rule: Callable[..., tuple[Tensor, Tensor]], seed: int = 0) -> Tensor:
    """k + 1 tokens of every row: one round with k guesses of the chain q, the rest drawn from p."""
    draws = sampler(seed)
    guesses: list[Tensor] = []
    last = torch.zeros(ROWS, dtype=torch.int64)
    for _ in range(k):
        last = draws.draw(q[last])
        guesses.append(last)
    before = torch.stack([torch.zeros_like(last), *guesses], 1)
    tokens, kept = rule(p[before], q[before[:, :k]], before[:, 1:], draws)
    for j in range(1, k + 1):
        tokens[:, j] = torch.where(j > kept, draws.draw(p[tokens[:, j - 1]]), tokens[:, j])
    return tokens


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_the_joint_distribution_is_the_models(k: int, sharpness: float) -> None:
    p, q = chain(1, sharpness), chain(2, sharpness)
    assert abs(surprise(texts(p, q, k, accept), p)) < SIGMAS


def test_guesses_that_the_model_hardly_ever_makes_and_tokens_that_are_never_guessed() -> None:
    p, q = chain(1), chain(2)
    p[:, 0], q[:, 1] = 1e-3, 0.0
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    assert abs(surprise(texts(p, q, 2, accept), p)) < SIGMAS


def kept_always(p: Tensor, q: Tensor, guesses: Tensor, draws: Sampler) -> tuple[Tensor, Tensor]:
    k = guesses.shape[1]
    return torch.cat([guesses, draws.draw(p[:, k])[:, None]], 1), torch.full((len(guesses),), k)


def replaced_from_p(p: Tensor, q: Tensor, guesses: Tensor, draws: Sampler) -> tuple[Tensor, Tensor]:
    tokens, kept = accept(p, q, guesses, draws)
    return tokens.scatter(1, kept[:, None], draws.draw(p[torch.arange(len(p)), kept])[:, None]), kept


def kept_in_gaps(p: Tensor, q: Tensor, guesses: Tensor, draws: Sampler) -> tuple[Tensor, Tensor]:
    """Counts every guess that fits, also after one that does not."""
    k, at = guesses.shape[1], guesses[..., None]
    kept = (draws.uniform(guesses.double()) * q.gather(-1, at)[..., 0] < p[:, :k].gather(-1, at)[..., 0]).sum(1)
    tokens, _ = accept(p, q, guesses, draws)
    return torch.where(torch.arange(k + 1) < kept[:, None], torch.cat([guesses, guesses[:, :1]], 1), tokens), kept


def q_of_one_place_before(p: Tensor, q: Tensor, guesses: Tensor, draws: Sampler) -> tuple[Tensor, Tensor]:
    return accept(p, q.roll(1, 1), guesses, draws)


@pytest.mark.parametrize("rule", [kept_always, replaced_from_p, kept_in_gaps, q_of_one_place_before])
def test_rules_that_are_near_it_are_caught(rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
    p, q = chain(1), chain(2)
    assert surprise(texts(p, q, 2, rule), p) > 10 * SIGMAS


def test_as_many_guesses_are_kept_as_can_be() -> None:
    """One guess is kept with probability Σ min(p, q): no rule that keeps the distribution does better."""
    p, q = chain(1)[0], chain(2)[0]
    draws = sampler()
    guesses = draws.draw(q.expand(ROWS, V))[:, None]
    _, kept = accept(p.expand(ROWS, 2, V), q.expand(ROWS, 1, V), guesses, draws)
    best = float(torch.minimum(p, q).sum())
    assert abs(float(kept.double().mean()) - best) < SIGMAS * (best * (1 - best) / ROWS) ** 0.5


def test_guesses_from_the_models_own_distribution_are_all_kept() -> None:
    p = chain(1)[torch.randint(V, (1000, 4), generator=torch.Generator().manual_seed(0))]
    draws = sampler()
    _, kept = accept(p, p[:, :3], draws.draw(p[:, :3]), draws)
    assert kept.tolist() == [3] * 1000


def test_what_is_left_where_nothing_is_left_is_the_models_distribution() -> None:
    """p is below q by rounding everywhere, and the guess was dropped all the same."""
    p = torch.tensor([[[0.5, 0.5 - 1e-7, 0.0], [0.0, 0.0, 1.0]]])
    q = torch.tensor([[[0.0, 0.5, 0.5]]])
    tokens, kept = accept(p, torch.maximum(p[:, :1], q), torch.tensor([[2]]), sampler())
    assert kept.tolist() == [0]
    assert tokens[0, 0] in (0, 1)


# Greedy


def test_greedy_keeps_guesses_up_to_the_first_that_is_not_the_models() -> None:
    greedy, best = Sampler(), torch.tensor([[2, 0, 3], [1, 1, 0], [0, 2, 2]])
    p = greedy.probabilities(torch.nn.functional.one_hot(best, V) * 2.0)
    assert torch.equal(p.argmax(-1), best)
    guesses = torch.tensor([[2, 0], [1, 3], [3, 2]])
    tokens, kept = accept(p, greedy.probabilities(torch.nn.functional.one_hot(guesses, V) * 1.0), guesses, greedy)
    assert kept.tolist() == [2, 1, 0]
    assert [row[: n + 1] for row, n in zip(tokens.tolist(), kept.tolist(), strict=True)] == [[2, 0, 3], [1, 1], [0]]


def test_greedy_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    greedy, before = Sampler(0.0, generator), generator.get_state()
    p = greedy.probabilities(torch.randn(3, 2, V))
    accept(p, p[:, :1], greedy.draw(p[:, :1]), greedy)
    assert torch.equal(generator.get_state(), before)


# Draws


def test_draws_are_in_proportion_to_the_weights_whatever_their_sum() -> None:
    weights = torch.tensor([0.0, 3.0, 1.0, 0.5])
    counts = torch.bincount(sampler().draw(weights.expand(ROWS, V)), minlength=V)
    share = weights / weights.sum()
    assert counts[0] == 0
    assert ((counts / ROWS - share).abs() < SIGMAS * (share * (1 - share) / ROWS).sqrt() + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_of_the_logits_over_the_temperature_and_never_below_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = Sampler(0.7).probabilities(logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, (logits.to(found.dtype) / 0.7).softmax(-1))
