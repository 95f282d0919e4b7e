"""A cache that finds no memory to grow is the cache that it was."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from small import model, tokens

from glm5_hal.formats import CacheFormat
from glm5_hal.integrations.transformers import PagedCache, apply
from glm5_hal.integrations.transformers import cache as caches

COLUMNS = 20


@pytest.fixture(scope="module")
def small() -> Any:
    return apply(model("shared"), page_size=8)


@torch.no_grad()
def run(small: Any, cache: PagedCache, seed: int = 0) -> torch.Tensor:
    logits: torch.Tensor = small(tokens(2, COLUMNS, seed), past_key_values=cache).logits
    return logits


def grown_again(small: Any) -> PagedCache:
    """Three passes into a cache whose rows share pages: the next one copies pages and makes more."""
    cache = PagedCache(small)
    run(small, cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    return cache


class Full:
    """Memory that runs out at the n-th time."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, call: Any) -> Any:
        def limited(*args: Any, **kwargs: Any) -> Any:
            if not self.left:
                raise torch.OutOfMemoryError("no room")
            self.left -= 1
            return call(*args, **kwargs)

        return limited


@pytest.mark.parametrize("started", [False, True], ids=["from nothing", "while rows share pages"])
@pytest.mark.parametrize("n", range(6))  # tensors of four layers, two of them with an indexer
def test_a_pass_without_room_may_be_run_again(
    small: Any, started: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = (grown_again(small) if started else PagedCache(small) for _ in range(2))
    expected = [run(small, other, seed) for seed in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(CacheFormat, "allocate", Full(n)(CacheFormat.allocate))
        with pytest.raises(torch.OutOfMemoryError):
            run(small, cache, 1)
    found = [run(small, cache, seed) for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("what", ["copies", "table"])
def test_room_may_also_lack_for_copies_and_tables(small: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = grown_again(small), grown_again(small)
    expected = [run(small, other, seed) for seed in (1, 2)]
    with monkeypatch.context() as patch:
        if what == "copies":
            patch.setattr(caches.memory, "tensors", Full(0)(caches.memory.tensors))
        else:
            patch.setattr(PagedCache, "_table", Full(0)(PagedCache._table))
        with pytest.raises(torch.OutOfMemoryError):
            run(small, cache, 1)
    found = [run(small, cache, seed) for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_two_layers_are_held_twice_at_a_time(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache(small)
    run(small, cache)
    before = [weakref.ref(t) for layer in cache.latent for t in layer]
    alive, allocate = [], CacheFormat.allocate

    def watched(self: CacheFormat, *args: Any, **kwargs: Any) -> Any:
        if self.kind == "latent":
            alive.append(sum(held() is not None for held in before))
        return allocate(self, *args, **kwargs)

    monkeypatch.setattr(CacheFormat, "allocate", watched)
    for seed in range(3):
        run(small, cache, seed)
    assert alive[:4] == [4, 3, 2, 1]
