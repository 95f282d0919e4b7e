"""PagedCache behind transformers' interface: what it says of itself, what it refuses, what it holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import model, tokens

from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers import PagedCache, apply
from glm5_hal.plan import StepPlan

COLUMNS = 20


@pytest.fixture(scope="module")
def small() -> Any:
    return apply(model("shared"), page_size=8)


@torch.no_grad()
def run(small: Any, cache: PagedCache, columns: int = COLUMNS, batch: int = 2, **kwargs: Any) -> torch.Tensor:
    logits: torch.Tensor = small(tokens(batch, columns), past_key_values=cache, **kwargs).logits
    return logits


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(HalError) as found:
        call(*args, **kwargs)
    assert found.value.fix
    return found.value.code


def test_it_counts_columns_and_rows(small: Any) -> None:
    cache = PagedCache(small)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, 0, False)
    run(small, cache)
    assert (cache.get_seq_length(), cache.batch_size, len(cache), cache.is_initialized) == (COLUMNS, 2, 4, True)
    assert cache.get_mask_sizes(3, 0) == (COLUMNS + 3, 0)
    assert cache.get_max_length() == -1
    assert cache.is_croppable
    assert "20 columns" in repr(cache)


def test_padding_takes_no_memory(small: Any) -> None:
    mask = torch.ones(2, COLUMNS)
    mask[0, :17] = 0
    cache = PagedCache(small)
    run(small, cache, attention_mask=mask)
    assert [len(table) for table in cache._pages.tables] == [1, 3]


def test_it_grows_and_keeps_what_it_holds(small: Any) -> None:
    cache = PagedCache(small)
    run(small, cache)
    before = [t[0][cache.block_table[1, :2].long()].clone() for t in cache.latent]
    for _ in range(40):
        run(small, cache, columns=1)
    assert cache.latent[0][0].shape[0] >= 2 * 8
    after = [t[0][cache.block_table[1, :2].long()] for t in cache.latent]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_within_what_is_reserved_no_tensor_is_replaced(small: Any) -> None:
    cache = PagedCache(small, batch_size=2, max_length=40)
    held = [cache.block_table.data_ptr(), *(t.data_ptr() for tensors in cache.latent for t in tensors)]
    run(small, cache)
    run(small, cache)
    assert [cache.block_table.data_ptr(), *(t.data_ptr() for ts in cache.latent for t in ts)] == held
    run(small, cache, columns=1)
    assert cache.block_table.shape[1] > 5


def test_a_pass_in_inference_mode_leaves_a_cache_that_others_can_write(small: Any) -> None:
    cache = PagedCache(small)
    expected = run(small, PagedCache(small))[:, -1]
    with torch.inference_mode():
        small(tokens(2, COLUMNS)[:, :-1], past_key_values=cache)
    with torch.no_grad():
        found = small(tokens(2, COLUMNS)[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_after_reset_it_takes_another_batch(small: Any) -> None:
    cache = PagedCache(small)
    run(small, cache, batch=3)
    expected = run(small, PagedCache(small))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(small, cache), expected)


def test_room_is_reserved_for_rows_that_are_known(small: Any) -> None:
    """Else the next pass would find no pages of its own, and its rows share the first."""
    cache = PagedCache(small)
    assert refused(cache.reserve, 64) == "SHAPE"
    expected = run(small, cache)
    assert torch.equal(run(small, PagedCache(small, batch_size=2, max_length=40)), expected)
    cache.reset()
    assert refused(cache.reserve, 64) == "SHAPE"
    assert torch.equal(run(small, cache), expected)
    assert [len(set(table)) for table in cache.block_table[:, :3].tolist()] == [3, 3]


def test_room_that_was_reserved_for_other_rows_is_none(small: Any) -> None:
    cache = PagedCache(small, batch_size=2, max_length=64)
    cache.batch_select_indices(torch.tensor([], dtype=torch.int64))
    expected = run(small, PagedCache(small), batch=3)
    assert torch.equal(run(small, cache, batch=3), expected)


def test_a_pass_that_fails_has_not_happened(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, expected = PagedCache(small), run(small, PagedCache(small))
    with monkeypatch.context() as patch:
        patch.setattr(small.model.layers[2].mlp, "forward", lambda x: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(small, cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(run(small, cache), expected)


def test_one_plan_serves_all_layers_and_knows_every_length(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, build = [], StepPlan.build

    def watched(*args: Any, **kwargs: Any) -> StepPlan:
        made.append(build(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(StepPlan, "build", watched)
    cache = PagedCache(small)
    run(small, cache)
    run(small, cache, columns=1)
    assert [plan.host for plan in made] == [
        {"seq_lens": (20, 20), "cu_seqlens_q": (0, 20, 40)},
        {"seq_lens": (21, 21), "cu_seqlens_q": (0, 1, 2)},
    ]
    assert [plan.seq_lens.tolist() for plan in made] == [[20, 20], [21, 21]]
    assert [plan.cu_seqlens_q.tolist() for plan in made] == [[0, 20, 40], [0, 1, 2]]


def test_what_contradicts_earlier_passes_is_refused(small: Any) -> None:
    mask = torch.ones(2, COLUMNS)
    mask[0, :5] = 0
    cache = PagedCache(small)
    run(small, cache, attention_mask=mask)
    assert refused(run, small, cache, columns=1) == "VALUE"
    assert refused(run, small, cache, columns=1, attention_mask=torch.ones(2, COLUMNS + 1)) == "VALUE"
    assert refused(run, small, cache, columns=1, batch=3) == "SHAPE"
    assert refused(cache.reserve, 64, batch_size=3) == "SHAPE"
    run(small, cache, columns=1, attention_mask=torch.cat([mask, torch.ones(2, 1)], 1))


def test_keys_are_indexed_in_steps_that_skip_scoring(small: Any) -> None:
    """12 tokens select each other all, 20 do not: the first 12 keys are the same."""
    short, long = PagedCache(small), PagedCache(small)
    ids = tokens(1, COLUMNS)
    with torch.no_grad():
        small(ids[:, :12], past_key_values=short)
        small(ids, past_key_values=long)
    written, expected = (c.index[0][c.block_table[0].long()].flatten(0, 1)[:12] for c in (short, long))
    assert expected.abs().amax(-1).min() > 0
    torch.testing.assert_close(written, expected, atol=1e-5, rtol=0)


def test_rope_keys_are_an_engines_and_not_de_interleaved_as_in_transformers(small: Any) -> None:
    ours, ids = PagedCache(small), tokens(1, COLUMNS)
    with torch.no_grad():
        small(ids, past_key_values=ours)
        theirs = model("shared")(ids, use_cache=True).past_key_values
    latent, rope = ours.latent[0][0][ours.block_table[0].long()].flatten(0, 1)[:COLUMNS].tensor_split([128], -1)
    torch.testing.assert_close(latent, theirs.layers[0].keys[0, 0], atol=1e-5, rtol=0)
    halves = theirs.layers[0].values[0, 0].view(COLUMNS, 2, 8)
    torch.testing.assert_close(rope, halves.transpose(1, 2).flatten(1), atol=1e-5, rtol=0)


def test_a_crop_is_counted_as_transformers_counts_it(small: Any) -> None:
    cache = PagedCache(small)
    run(small, cache)
    assert refused(cache.crop, 4) == "SCALAR"
    cache.crop(0)
    assert cache.get_seq_length() == COLUMNS
    cache.crop(-100)
    assert cache.get_seq_length() == 0


def test_rows_may_be_cropped_to_lengths_of_their_own(small: Any) -> None:
    """As speculative decoding does, where one request accepts more tokens than another."""
    ids, more, kept = tokens(3, COLUMNS), tokens(3, 4, seed=1), [20, 9, 13]
    cache = PagedCache(small)
    run(small, cache, batch=3)
    cache.crop_rows(torch.tensor(kept))
    assert cache.get_seq_length() == 20
    assert cache.mask.sum(1).tolist() == kept
    with torch.no_grad():
        found = small(
            more,
            past_key_values=cache,
            attention_mask=torch.cat([cache.mask, torch.ones(3, 4)], 1),
            position_ids=torch.tensor(kept)[:, None] + torch.arange(4),
        ).logits
        for r, n in enumerate(kept):
            expected = small(torch.cat([ids[r : r + 1, :n], more[r : r + 1]], 1)).logits[:, n:]
            torch.testing.assert_close(found[r : r + 1], expected, atol=1e-5, rtol=0)


def test_a_crop_to_equal_lengths_needs_no_mask_and_gives_back_columns(small: Any) -> None:
    mask = torch.ones(2, COLUMNS)
    mask[0, 5:] = 0
    cache = PagedCache(small)
    run(small, cache, attention_mask=mask)
    cache.crop_rows(torch.tensor([4, 4]))
    assert cache.get_seq_length() == 4
    run(small, cache, columns=1)


@pytest.mark.parametrize("how", ["crop", "crop_rows", "select", "reorder"])
def test_without_padding_left_no_mask_is_needed(small: Any, how: str) -> None:
    mask = torch.ones(3, COLUMNS)
    mask[0, 15:] = 0
    cache = PagedCache(small)
    run(small, cache, batch=3, attention_mask=mask)
    if how == "crop":
        cache.crop(15 - COLUMNS)
    elif how == "crop_rows":
        cache.crop_rows(torch.tensor([15, 15, 15]))
    elif how == "select":
        cache.batch_select_indices(torch.tensor([False, True, True]))
    else:
        cache.reorder_cache(torch.tensor([2, 1, 2]))
    batch, seen = cache.batch_size, cache.get_seq_length()
    assert cache.mask.all()
    found = run(small, copy.deepcopy(cache), columns=1, batch=batch)
    whole = torch.ones(batch, seen + 1)
    assert torch.equal(run(small, cache, columns=1, batch=batch, attention_mask=whole), found)


def test_a_crop_that_leaves_padding_still_needs_the_mask(small: Any) -> None:
    mask = torch.ones(2, COLUMNS)
    mask[0, 10:15] = 0
    cache = PagedCache(small)
    run(small, cache, attention_mask=mask)
    cache.crop(12 - COLUMNS)
    assert refused(run, small, cache, columns=1) == "VALUE"
    run(small, cache, columns=1, attention_mask=torch.cat([mask[:, :12], torch.ones(2, 1)], 1))


def test_a_row_cannot_be_cropped_to_more_than_it_holds(small: Any) -> None:
    cache = PagedCache(small)
    run(small, cache)
    for lengths in ([20, 21], [-1, 3], [3]):
        assert refused(cache.crop_rows, torch.tensor(lengths)) == "VALUE"
    assert cache.get_seq_length() == COLUMNS
