"""A bundle that tests may alter."""

from __future__ import annotations

import shutil
from pathlib import Path

import bundles
import pytest

from glm5_hal.conformance.bundle import manifest, verify


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "suite", bundles.committed)
        patch.setattr(manifest, "limits", lambda device, dtypes: bundles.rates())
        return bundles.write(tmp_path_factory.mktemp("pristine") / "bundle")


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, for a suite that is committed."""
    monkeypatch.setattr(verify, "suite", bundles.committed)
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))
