"""A Kunlunxin XPU is what an ordinary torch calls cuda once torch_xmlir has taken it over."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends import cuda, kunlunxin


@pytest.mark.parametrize("name", ["GPU", "Kunlun-XPU"])
def test_an_xpu(build: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever the imitation of CUDA below it says of its name and its capability."""
    monkeypatch.setitem(sys.modules, "torch_xmlir", ModuleType("torch_xmlir"))
    build("2.5.1+cu118", name, capability=(8, 6))
    found = kunlunxin.probe()
    assert isinstance(found, Device)
    assert (found.type, found.name, found.arch, found.count) == ("cuda", f"Kunlunxin XPU ({name})", "xpu", 2)
    assert isinstance(cuda.probe(), Unavailable)


@pytest.fixture
def asleep(build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is installed, and has not taken torch over. To import it would put its kernels in."""
    (tmp_path / "torch_xmlir.py").write_text("raise AssertionError('a probe looks, and imports nothing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("DISABLE_XPYTORCH", raising=False)
    build("2.9.0+cu128", "NVIDIA H100", cuda="12.8", capability=(9, 0))


def test_its_hook_may_have_failed(asleep: None) -> None:
    found = kunlunxin.probe()
    assert isinstance(found, Unavailable)
    assert "has not taken torch 2.9.0+cu128 over" in found.reason
    assert found.fault
    assert isinstance(cuda.probe(), Device)


def test_its_hook_may_be_switched_off(asleep: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_XPYTORCH", "1")
    found = kunlunxin.probe()
    assert isinstance(found, Unavailable)
    assert found.fix == "unset DISABLE_XPYTORCH"
    assert not found.fault


def test_no_device_behind_it_is_broken(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xmlir", ModuleType("torch_xmlir"))
    build("2.5.1+cu118", "", count=0)
    found = kunlunxin.probe()
    assert isinstance(found, Unavailable)
    assert "xpu-smi" in found.fix
    assert found.fault
