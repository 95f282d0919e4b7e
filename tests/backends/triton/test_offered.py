"""Triton's kernels are offered where Triton works, and say why where it does not."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from toys import checked_here, installed, stand_in

from glm5_hal import explain
from glm5_hal.backend import Device
from glm5_hal.backends import _torch
from glm5_hal.backends._triton import offered as module
from glm5_hal.backends._triton.offered import offered
from glm5_hal.backends._triton.tuning import CONSERVATIVE as TUNING
from glm5_hal.doctor import examine
from glm5_hal.errors import HalError
from glm5_hal.plugins import PluginRecord, child


def emulated(kernels: Any) -> PluginRecord:
    device = Device("cpu", "a stand-in", "sm_90", evidence="emulated")
    return stand_in("emulated", kernels, probe=lambda: device, builtin=True)


def put(patch: pytest.MonkeyPatch, version: str | None) -> None:
    """A module ``triton`` of that version."""
    found = ModuleType("triton")
    found.__spec__ = ModuleSpec("triton", None)
    if version is not None:
        found.__version__ = version  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "triton", found)


def test_triton_is_offered_where_it_is_installed() -> None:
    pytest.importorskip("triton")
    kernels = offered("sm_90", TUNING)
    assert "triton" in {kernel.provider for kernel in kernels}
    assert not any("Triton" in r.describe() for kernel in kernels for r in kernel.requires)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(sys.modules, "triton", None)
    missing = "triton>=3.2 is needed and triton is not installed"
    monkeypatch.setattr(module, "package_problem", lambda *args: missing)
    monkeypatch.setattr("glm5_hal.capability.package_problem", lambda *args: missing)
    return monkeypatch


def test_without_triton_explain_says_so_and_the_rest_goes_on(without_triton: pytest.MonkeyPatch) -> None:
    with installed(emulated(lambda: [*offered("sm_90", TUNING), *_torch.kernels()])):
        found = explain("mla_decode")
    first, second = found.resolution.trace[:2]
    assert first.as_dict() == {
        "candidate": "emulated:triton",
        "accepted": False,
        "code": "PACKAGE",
        "detail": "triton>=3.2 is needed and triton is not installed",
        "fix": "pip install 'triton>=3.2'",
    }
    assert (second.candidate, second.as_dict()["accepted"]) == ("emulated:torch", True)


def test_without_triton_the_doctor_says_so(without_triton: pytest.MonkeyPatch) -> None:
    without_triton.setattr(child, "check_up", checked_here)
    with installed(emulated(lambda: [*offered("sm_90", TUNING), *_torch.kernels()])):
        (found,) = examine().backends
    assert found.state == "ok"
    assert found.kernel.startswith("rms_norm on emulated:torch: right; emulated:triton")
    assert "pip install 'triton>=3.2'" in found.kernel


@pytest.mark.parametrize("version", ["3.1.0", "2.3.1"])
def test_an_old_triton_is_not_used(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    put(monkeypatch, version)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    (kernel, *_) = offered("sm_90", TUNING)
    assert kernel.requires[0].describe() == "triton>=3.2"
    with installed(emulated(lambda: offered("sm_90", TUNING))):
        (step,) = explain("rms_norm").resolution.trace
    assert f"{version} is installed" in str(step)


def test_a_triton_that_cannot_be_imported_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "3.5.0")
    monkeypatch.setattr(module, "package_problem", lambda *args: None)

    def fail(tuning: Any) -> Any:
        raise ImportError("libtriton.so: no such file")

    monkeypatch.setattr("glm5_hal.backends._triton.kernels", fail)
    (kernel, *_) = offered("sm_90", TUNING)
    assert kernel.requires[0].describe() == "Triton's kernels cannot be imported: libtriton.so: no such file"


def test_nobody_calls_what_is_not_there(without_triton: pytest.MonkeyPatch) -> None:
    for kernel in offered("sm_90", TUNING):
        with pytest.raises(HalError) as problem:
            kernel.fn()
        assert problem.value.code == "UNAVAILABLE"


# --- a vendor's own Triton -------------------------------------------------------------------------------------------

BUILD = "install the vendor's Triton"


def told(build: str) -> tuple[Any, Any]:
    with installed(emulated(lambda: offered("sm_90", TUNING, build))):
        (step,) = explain("rms_norm").resolution.trace
    return step.as_dict()["detail"], step.as_dict()["fix"]


def test_where_the_ordinary_one_does_not_compile_for_the_chip_the_fix_is_the_vendors(
    without_triton: pytest.MonkeyPatch,
) -> None:
    assert told(BUILD) == ("triton>=3.2 is needed and triton is not installed", BUILD)
    for kernel in offered("sm_90", TUNING, BUILD):
        with pytest.raises(HalError) as problem:
            kernel.fn()
        assert problem.value.fix == BUILD


def test_a_folder_of_that_name_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, None)
    detail, fix = told(BUILD)
    assert "has no attribute '__version__'" in detail
    assert fix == BUILD
