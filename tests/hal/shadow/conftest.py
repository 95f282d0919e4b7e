"""A shadow file of its own for every test, and nothing sampled before or after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import glm5_hal
from glm5_hal import context, shadow


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("GLM5_SHADOW", raising=False)
    context.reset()
    yield tmp_path / "shadow.jsonl"
    glm5_hal.watch()
    shadow.forked()
    context.reset()
