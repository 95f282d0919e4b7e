"""Fixtures of the plain torch kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from glm5_hal.backends._torch import attention, indexer, numbers


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the smoke samples have many, with ragged last ones, none a multiple of a page."""
    for module, name, value in (
        (attention, "KEYS", 5),
        (attention, "TOKENS", 2),
        (attention, "PREFILL_QUERIES", 4),
        (attention, "PREFILL_KEYS", 7),
        (attention, "PREFILL_HEADS", 2),
        (indexer, "KEYS", 5),
        (indexer, "TOKENS", 2),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def far_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take the CPU for a device whose memory the host has to wait for."""
    monkeypatch.setattr(numbers, "HOST_MEMORY", set())
