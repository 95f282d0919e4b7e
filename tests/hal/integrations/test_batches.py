"""Unequal lengths, chunks, crops, copied rows: what a row gets does not depend on how it came there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import KINDS, model, tokens
from torch import Tensor

from glm5_hal.integrations.transformers import PagedCache, apply

LENGTHS, COLUMNS = (29, 15, 40), 40
LEFT = torch.stack([torch.arange(COLUMNS) >= COLUMNS - n for n in LENGTHS]).long()
RIGHT = LEFT.flip(1)
HOLES = RIGHT.clone()
HOLES[0, 3:9] = 0
MASKS = pytest.mark.parametrize("mask", [LEFT, RIGHT, HOLES], ids=["left", "right", "holes"])


def positions(mask: Tensor) -> Tensor:
    """As `generate` counts them: real tokens from 0."""
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def steps(model: Any, ids: Tensor, mask: Tensor, more: Tensor, cache: Any = None, chunk: int = COLUMNS) -> Tensor:
    """Logits of the prompt, ``chunk`` columns at a time, and of ``more`` tokens, one at a time."""
    logits, ids = [], torch.cat([ids, more], 1)
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    ends = [*range(chunk, COLUMNS, chunk), *range(COLUMNS, ids.shape[1] + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        out = model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions(mask)[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


@MASKS
@pytest.mark.parametrize("kind", KINDS)
def test_padding_left_right_or_between_gives_what_transformers_gives(kind: str, mask: Tensor) -> None:
    small, ids, more = model(kind), tokens(3, COLUMNS), tokens(3, 64, seed=1)
    expected = steps(small, ids, mask, more)
    found = steps(apply(small), ids, mask, more)
    real = torch.cat([mask, torch.ones_like(more)], 1).bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=0)


@MASKS
@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_chunks_of_a_prompt_give_what_the_whole_does(mask: Tensor, chunk: int) -> None:
    small, ids, more = apply(model("shared")), tokens(3, COLUMNS), tokens(3, 3, seed=1)
    whole, parts = (steps(small, ids, mask, more, chunk=n) for n in (COLUMNS, chunk))
    real = torch.cat([mask, torch.ones_like(more)], 1).bool()
    torch.testing.assert_close(parts[real], whole[real], atol=1e-5, rtol=0)


@MASKS
def test_a_row_is_what_it_is_alone(mask: Tensor) -> None:
    small, ids, more = apply(model("glm")), tokens(3, COLUMNS), tokens(3, 5, seed=1)
    together = steps(small, ids, mask, more)
    for r in range(3):
        alone = steps(small, ids[r : r + 1], mask[r : r + 1], more[r : r + 1])
        real = torch.cat([mask[r], torch.ones_like(more[r])]).bool()
        torch.testing.assert_close(together[r, real], alone[0, real], atol=1e-5, rtol=0)


@MASKS
def test_columns_that_were_cropped_leave_no_trace(mask: Tensor) -> None:
    small, ids, more = apply(model("shared")), tokens(3, COLUMNS), tokens(3, 9, seed=1)
    expected = steps(small, ids, mask, more)[:, COLUMNS:]
    cache = PagedCache(small)
    steps(small, ids, mask, tokens(3, 30, seed=2), cache)
    cache.crop(-30)
    whole = torch.cat([mask, torch.ones_like(more)], 1)
    with torch.no_grad():
        found = small(
            more, past_key_values=cache, attention_mask=whole, position_ids=positions(whole)[:, COLUMNS:]
        ).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@MASKS
@pytest.mark.parametrize("kept", [37, 20, 3, 0])
def test_a_crop_may_reach_into_padding(mask: Tensor, kept: int) -> None:
    small, ids = apply(model("glm")), tokens(3, COLUMNS)
    cache = PagedCache(small)
    with torch.no_grad():
        whole = small(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache).logits
        cache.crop(kept - COLUMNS)
        assert cache.get_seq_length() == kept
        again = small(
            ids[:, kept:], attention_mask=mask, position_ids=positions(mask)[:, kept:], past_key_values=cache
        ).logits
    real = mask[:, kept:].bool()
    torch.testing.assert_close(again[real], whole[:, kept:][real], atol=1e-5, rtol=0)


@MASKS
@pytest.mark.parametrize("page_size", [1, 8, 64])
def test_rows_may_be_copied_reordered_and_dropped(mask: Tensor, page_size: int) -> None:
    small = apply(model("shared"), page_size=page_size)
    ids, more = tokens(3, COLUMNS), tokens(4, 20, seed=1)
    rows = torch.tensor([2, 0, 2, 1])
    expected = steps(small, ids[rows], mask[rows], more)[:, COLUMNS:]
    cache = PagedCache(small)
    steps(small, ids, mask, more[:3, :0], cache)
    cache.reorder_cache(rows)
    whole = torch.cat([mask[rows], torch.ones_like(more)], 1)
    for i in range(20):
        now = slice(COLUMNS + i, COLUMNS + i + 1)
        with torch.no_grad():
            found = small(
                more[:, i : i + 1],
                past_key_values=cache,
                attention_mask=whole[:, : now.stop],
                position_ids=positions(whole)[:, now],
            ).logits
        torch.testing.assert_close(found, expected[:, i : i + 1], atol=1e-5, rtol=0)
    cache.batch_select_indices(torch.tensor([False, True, False, True]))
    assert cache.batch_size == 2
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6


def test_without_a_cache_the_result_is_the_same() -> None:
    small, ids = apply(model("shared")), tokens(2, COLUMNS)
    with torch.no_grad():
        with_cache, without = (small(ids, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache.logits, without.logits)
    assert isinstance(with_cache.past_key_values, PagedCache)
    assert without.past_key_values is None


def test_embeddings_may_be_given_instead_of_tokens() -> None:
    small, ids = apply(model("glm")), tokens(2, COLUMNS)
    with torch.no_grad():
        assert torch.equal(small(inputs_embeds=small.model.embed_tokens(ids)).logits, small(ids).logits)
