"""Each vendor's device is told by a mark of its own; what is broken says what to do; nothing raises."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends import _probing
from glm5_hal.backends._probing import Vendor, as_cuda, extended, installed, marked, never_raises, none_there, versions
from glm5_hal.errors import HalError

METAX = Vendor("MetaX", "mx-smi", ("ACME_VISIBLE_DEVICES",), "install torch of MetaX")
MUSA = Vendor("Moore Threads", "mthreads-gmi", ("MUSA_VISIBLE_DEVICES",), "install torch_musa")


def a_torch(
    version: str = "2.9.0+cu128", name: str = "a GPU", count: int = 1, slot: str = "privateuseone", **more: Any
) -> Any:
    cuda = SimpleNamespace(
        is_available=lambda: count > 0, device_count=lambda: count, get_device_name=lambda which: name
    )
    known = {"cuda": "12.8", "hip": None, **more}
    core = SimpleNamespace(_get_privateuse1_backend_name=lambda: slot)
    return SimpleNamespace(__version__=version, version=SimpleNamespace(**known), cuda=cuda, _C=core)


#: What the vendors' builds look like, as they call themselves.
BUILDS: dict[str, Any] = {
    "AMD": a_torch("2.9.0+rocm6.4", cuda=None, hip="6.4"),
    "Hygon": a_torch("2.9.0+das.opt1.dtk2604", cuda=None, hip="6.1"),
    "Iluvatar": a_torch("2.4.1+corex.4.3.0", cuda="10.2"),
    "MetaX": a_torch("2.8.0+metax3.5.3.9", cuda="11.6"),
    "Moore Threads": a_torch("2.7.1", cuda=None, musa="4.0.0"),
}


@pytest.mark.parametrize("vendor", BUILDS)
def test_every_build_has_one_mark(vendor: str) -> None:
    assert marked(BUILDS[vendor]) == (vendor,)


def test_an_ordinary_build_has_none() -> None:
    assert marked(a_torch()) == marked(a_torch("2.13.0+cpu", cuda=None)) == ()


def test_an_extension_beside_an_nvidia_build_does_not_mark_its_cuda() -> None:
    assert marked(a_torch(musa="4.0.0")) == ()


def test_a_hook_that_took_an_ordinary_build_over_marks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xmlir", ModuleType("torch_xmlir"))
    assert marked(a_torch()) == ("Kunlunxin",)


def test_an_unnamed_hip_build_is_hygons_where_its_tools_are(monkeypatch: pytest.MonkeyPatch) -> None:
    build = a_torch("2.7.0a0+git1234", cuda=None, hip="6.1")
    assert marked(build) == ("AMD",)
    monkeypatch.setattr(_probing, "which", lambda command: f"/opt/hyhal/bin/{command}")
    assert marked(build) == ("Hygon",)
    assert marked(BUILDS["AMD"]) == ("AMD",)


# --- a device that is called cuda ------------------------------------------------------------------------------------


def test_its_own_device_is_the_vendors() -> None:
    assert as_cuda(METAX, BUILDS["MetaX"]) is None


@pytest.mark.parametrize("vendor", [name for name in BUILDS if name != "MetaX"])
def test_another_vendors_is_not(vendor: str) -> None:
    found = as_cuda(METAX, BUILDS[vendor])
    assert found is not None
    assert f"is no build of MetaX: it calls a device of {vendor} cuda" in found.reason
    assert (found.fix, found.fault) == ("install torch of MetaX", False)


def test_the_marks_of_two_vendors_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xmlir", ModuleType("torch_xmlir"))
    found = as_cuda(METAX, BUILDS["MetaX"])
    assert found is not None
    assert "the marks of Kunlunxin and MetaX" in found.reason
    assert found.fault


@pytest.mark.parametrize(("suspected", "name", "its"), [(True, "MetaX C500", True), (True, "NVIDIA H100", False)])
def test_an_unmarked_build_tells_by_its_devices_name(suspected: bool, name: str, its: bool) -> None:
    assert (as_cuda(METAX, a_torch(name=name), suspected) is None) == its


def test_without_a_suspicion_no_driver_is_asked_for_a_name() -> None:
    build = a_torch()
    build.cuda.is_available = build.cuda.get_device_name = None
    assert as_cuda(METAX, build) is not None


def test_no_device_names_what_may_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    build = a_torch("2.8.0+metax3.5.3.9", count=0)
    monkeypatch.setenv("ACME_VISIBLE_DEVICES", "7")
    found = as_cuda(METAX, build)
    assert found is not None
    assert found.reason == "MetaX's torch 2.8.0+metax3.5.3.9 finds no device"
    assert "`mx-smi`" in found.fix
    assert "ACME_VISIBLE_DEVICES='7' is set" in found.fix
    assert found.fault


# --- a device type of its own ----------------------------------------------------------------------------------------


def space(count: int = 2) -> Any:
    return SimpleNamespace(is_available=lambda: count > 0, device_count=lambda: count, get_device_name=lambda i: "MTT")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_musa", ModuleType("torch_musa"))


def test_what_is_not_installed_is_absent() -> None:
    assert extended(MUSA, a_torch(), "torch_musa", "musa") == Unavailable(
        "torch_musa is not installed", "install torch_musa"
    )


@pytest.mark.parametrize("slot", ["privateuseone", "musa"])
def test_an_extension_gives_its_namespace(module: None, slot: str) -> None:
    build = a_torch(slot=slot)
    build.musa = space()
    assert extended(MUSA, build, "torch_musa", "musa") is build.musa


def test_where_another_extension_has_the_place_this_one_is_not_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "torch_musa.py").write_text("raise AssertionError('it would take the place, or fail')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = extended(MUSA, a_torch(slot="npu"), "torch_musa", "musa")
    assert isinstance(found, Unavailable)
    assert "one place for an outside device to 'npu'" in found.reason
    assert not found.fault


@pytest.mark.parametrize(
    "source",
    [
        "raise ImportError('libmusa_python.so: cannot open shared object file')",
        "raise OSError('libmusart.so.4: cannot open shared object file')",
        "raise RuntimeError('undefined symbol: _ZN3c10\\nand more')",
    ],
    ids=["its library", "its SDK", "another torch"],
)
def test_one_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, source: str) -> None:
    (tmp_path / "torch_musa.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = extended(MUSA, a_torch("2.9.0+cpu"), "torch_musa", "musa")
    assert isinstance(found, Unavailable)
    assert "beside torch 2.9.0+cpu, cannot be imported: " in found.reason
    assert "\n" not in found.reason
    assert "LD_LIBRARY_PATH" in found.fix
    assert found.fault


@pytest.mark.parametrize("given", [None, SimpleNamespace(is_available=lambda: True)])
def test_one_without_its_functions_is_half_installed(module: None, given: Any) -> None:
    build = a_torch()
    build.musa = given
    found = extended(MUSA, build, "torch_musa", "musa")
    assert isinstance(found, Unavailable)
    assert "gives torch no musa." in found.reason
    assert found.fault


def test_no_device_behind_it_is_broken_too() -> None:
    assert none_there(MUSA, space(), "torch_musa") is None
    found = none_there(MUSA, space(0), "torch_musa")
    assert found is not None
    assert "MUSA_VISIBLE_DEVICES" in found.fix
    assert found.fault


def test_a_module_that_was_blocked_or_has_no_spec_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gone", None)
    monkeypatch.setitem(sys.modules, "there", ModuleType("there"))
    assert (installed("gone"), installed("there"), installed("nowhere"), installed("nowhere.at.all")) == (
        False,
        True,
        False,
        False,
    )


def test_torch_says_who_has_its_place() -> None:
    assert _probing.privateuse1(torch) == torch._C._get_privateuse1_backend_name()


# --- whatever happens ------------------------------------------------------------------------------------------------


def test_a_probe_is_given_torch_and_what_it_raises_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    @never_raises("ACME", lambda: "mend it")
    def fails(given: Any) -> Device:
        assert given is torch
        raise RuntimeError("driver error 42")

    @never_raises("ACME", lambda: "mend it")
    def told(given: Any) -> Device:
        raise HalError("UNAVAILABLE", "no torch", fix="reinstall it")

    expected = Unavailable("torch cannot use its ACME device: RuntimeError: driver error 42", "mend it", fault=True)
    assert fails() == expected
    assert told() == Unavailable("no torch", "reinstall it", fault=True)


def test_versions_are_those_that_somebody_knows() -> None:
    assert versions("torch", "no-such-distribution", driver="", sdk=None, other="1") == {
        "torch": _probing.version_of("torch"),
        "other": "1",
    }


def test_looking_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    marked(a_torch()), as_cuda(METAX, a_torch()), extended(MUSA, a_torch(), "torch_musa", "musa")
    assert dict(os.environ) == before
