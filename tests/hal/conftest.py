"""Fixtures of the core's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


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
