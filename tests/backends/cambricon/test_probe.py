"""A Cambricon MLU is what torch_mlu has, counted without starting its driver."""

from __future__ import annotations

import os
from typing import Any

import pytest

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends import cambricon
from glm5_hal.backends.cambricon.device import CHECK


def test_an_mlu(extension: Any) -> None:
    extension("torch_mlu", "mlu", "MLU590-H8", capability=(5, 0))
    found = cambricon.probe()
    assert isinstance(found, Device)
    assert (found.type, found.name, found.arch, found.count) == ("mlu", "MLU590-H8", "mlu_50", 2)


def test_one_without_bfloat16_is_not_taken(extension: Any) -> None:
    extension("torch_mlu", "mlu", "MLU370-X8", capability=(3, 0))
    found = cambricon.probe()
    assert isinstance(found, Unavailable)
    assert "bfloat16 begins with 5" in found.reason
    assert not found.fault


@pytest.mark.parametrize("before", [None, "0"])
def test_devices_are_counted_by_the_management_library(
    extension: Any, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """And the user's own setting is put back."""
    if before is not None:
        monkeypatch.setenv(CHECK, before)
    asked = []
    space = extension("torch_mlu", "mlu", "MLU590-H8", capability=(5, 0))
    space.is_available = lambda: bool(asked.append(os.environ.get(CHECK)) or True)
    assert isinstance(cambricon.probe(), Device)
    assert asked[0] == "1"
    assert os.environ.get(CHECK) == before


def test_it_is_put_back_where_that_fails_too(extension: Any) -> None:
    def fail() -> bool:
        raise RuntimeError("cndev")

    extension("torch_mlu", "mlu", "MLU590-H8").is_available = fail
    found = cambricon.probe()
    assert isinstance(found, Unavailable)
    assert found.fault
    assert CHECK not in os.environ
