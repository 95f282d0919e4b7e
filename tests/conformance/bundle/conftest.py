"""A bundle that tests may alter."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import bundles
import pytest

from glm5_hal.conformance.bundle import manifest, rerun, verify


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


@pytest.fixture(scope="session")
def _computed() -> object:
    return functools.cache(rerun.computed)


@pytest.fixture
def computed_once(_computed: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers gave for the same plan and cases before, they are not started for again: that is slow."""
    monkeypatch.setattr(rerun, "computed", _computed)
