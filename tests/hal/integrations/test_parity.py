"""The logits are those of transformers' own eager run, where the choice of keys is one that rounding cannot change."""

from __future__ import annotations

import copy

import pytest
import torch
from small import KINDS, TOP_K, float64, gaps, greedy, model, tokens
from torch import Tensor

from glm5_hal.integrations.transformers import apply

#: Prompts of more tokens than top-k, then steps.
PROMPT, STEPS = 40, 64

#: Seeds whose k-th and next score are at least GAP of the largest apart in every row of every indexer: ten times what
#: float32 moves them by.
GAP = 1e-5
SEEDS = [("glm", 0), ("glm", 2), ("glm", 3), ("shared", 0), ("shared", 1), ("shared", 2)]
SEEDS += [("deepseek", 0), ("deepseek", 2), ("deepseek", 4)]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(("kind", "seed"), SEEDS)
def test_float32_prefill_and_cached_steps_within_1e_4_and_the_same_greedy_tokens(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, ids = model(kind, seed), tokens(2, PROMPT, seed)
    expected, chosen = greedy(small, ids, STEPS)
    with gaps(monkeypatch) as found:
        logits, ours = greedy(apply(small), ids, STEPS)
    indexers = sum(layer.self_attn.indexer is not None for layer in small.model.layers)
    assert len(found) == indexers * 2 * (PROMPT + STEPS - TOP_K)
    assert min(found) > GAP
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(ours, chosen)


@pytest.mark.parametrize(("kind", "seed"), [row for row in SEEDS if row[1] in (0, 2)])
def test_float64_within_1e_9_of_transformers_with_its_float32_islands_widened(kind: str, seed: int) -> None:
    small, ids = model(kind, seed), tokens(2, PROMPT, seed)
    expected, chosen = greedy(float64(small), ids, STEPS)
    logits, ours = greedy(apply(small.double()), ids, STEPS)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
    assert torch.equal(ours, chosen)


def bfloat16_errors(kind: str, top_k: int) -> tuple[Tensor, Tensor]:
    """By how much bfloat16 logits differ from float32 ones of the same weights, seed by seed: eager, and ours."""
    floor, ours = [], []
    for seed in range(6):
        small, ids = model(kind, seed, index_topk=top_k).bfloat16(), tokens(2, 2 * PROMPT, seed)
        with torch.no_grad():
            truth = copy.deepcopy(small).float()(ids).logits
            floor.append(rms(small(ids).logits.float() - truth))
            ours.append(rms(apply(small)(ids).logits.float() - truth))
    return torch.tensor(floor), torch.tensor(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_with_all_keys_is_nearer_to_float32_than_eager_bfloat16(kind: str) -> None:
    floor, ours = bfloat16_errors(kind, top_k=2 * PROMPT)
    assert ours.min() > 0
    assert ours.mean() <= floor.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_with_chosen_keys_is_within_the_noise_of_eager_bfloat16(kind: str) -> None:
    """Rounding changes which keys are chosen, here and there, in either: the means agree within two standard errors."""
    floor, ours = bfloat16_errors(kind, top_k=TOP_K)
    more = ours - floor
    assert more.mean() <= 2 * more.std() / len(more) ** 0.5


def test_float32_weights_of_the_head_weights_stay_float32_in_bfloat16() -> None:
    """`from_pretrained` keeps indexer.weights_proj in float32; the operators take it so."""
    small = model("glm").bfloat16()
    for layer in small.model.layers:
        layer.self_attn.indexer.weights_proj.float()
    ids = tokens(1, PROMPT)
    with torch.no_grad():
        expected = small(ids).logits
        assert rms(apply(small)(ids).logits - expected) < 0.3 * rms(expected)


def test_latents_are_normed_with_the_eps_of_transformers_and_not_the_layers() -> None:
    """1e-6, where the layers' norms have 1e-5: with small weights the two differ."""
    small, ids = model("glm", rms_norm_eps=1e-2, initializer_range=0.02), tokens(2, PROMPT)
    with torch.no_grad():
        expected = small(ids).logits
        torch.testing.assert_close(apply(small)(ids).logits, expected, atol=1e-5, rtol=0)


def test_hidden_states_and_router_logits_come_out_as_from_transformers() -> None:
    small, ids = model("shared"), tokens(2, PROMPT)
    wanted = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        before, after = small(ids, **wanted), apply(small)(ids, **wanted)
    for name in ("hidden_states", "router_logits"):
        assert len(after[name]) == len(before[name]) > 0
        for mine, theirs in zip(after[name], before[name], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
