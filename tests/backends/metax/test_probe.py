"""A MetaX GPU is what MetaX's torch calls cuda; an unmarked build tells by the device's name, where the driver is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends import metax
from glm5_hal.backends.metax import device


@pytest.mark.parametrize(("name", "arch"), [("MetaX C500", "c500"), ("MetaX C550", "c550"), ("MetaX C500 X", "c500_x")])
def test_a_gpu(build: Any, name: str, arch: str) -> None:
    build("2.8.0+metax3.5.3.9", name)
    found = metax.probe()
    assert isinstance(found, Device)
    assert (found.type, found.name, found.arch, found.count) == ("cuda", name, arch, 2)
    assert found.versions["maca"] == "3.5.3.9"


@pytest.mark.parametrize(("driver", "taken"), [(True, True), (False, False)])
def test_an_unmarked_build(
    build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: bool, taken: bool
) -> None:
    monkeypatch.delenv("MACA_PATH", raising=False)
    monkeypatch.setattr(device, "DRIVER", tmp_path if driver else tmp_path / "nowhere")
    build("2.8.0", "MetaX C500")
    assert isinstance(metax.probe(), Device) == taken


def test_its_driver_beside_another_vendors_device_does_not_make_that_its_own(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MACA_PATH", "/opt/maca")
    build("2.9.0+cu128", "NVIDIA H100", cuda="12.8")
    assert isinstance(metax.probe(), Unavailable)


def test_no_device_behind_its_build_is_broken(build: Any) -> None:
    build("2.8.0+metax3.5.3.9", "", count=0)
    found = metax.probe()
    assert isinstance(found, Unavailable)
    assert "MACA_VISIBLE_DEVICES" in found.fix
    assert found.fault
