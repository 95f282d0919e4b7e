"""A Moore Threads GPU is what torch_musa has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm5_hal.backend import Device
from glm5_hal.backends import musa


@pytest.mark.parametrize(("capability", "arch", "features"), [((3, 1), "mp_31", {"fp8"}), ((2, 2), "mp_22", set())])
def test_a_gpu(
    extension: Any, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str, features: set[str]
) -> None:
    extension("torch_musa", "musa", "MTT S5000", capability=capability)
    monkeypatch.setattr(torch.version, "musa", "5.2.0", raising=False)
    found = musa.probe()
    assert isinstance(found, Device)
    assert (found.type, found.name, found.arch, found.count) == ("musa", "MTT S5000", arch, 2)
    assert found.features == features
    assert {"musa": "5.2.0", "torch": torch.__version__}.items() <= found.versions.items()
