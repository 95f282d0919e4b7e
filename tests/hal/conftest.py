"""Fixtures of the core's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny shapes: a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No settings of ours in the environment, and nothing learnt before or left behind."""
    from glm5_hal import context, observe

    for name in ("GLM5_BACKEND", "GLM5_LOG", "GLM5_SHADOW"):
        monkeypatch.delenv(name, raising=False)
    context.reset()
    observe.clear_counts()
    yield monkeypatch
    monkeypatch.undo()
    observe.watch()
    observe.clear_counts()
    context.reset()
