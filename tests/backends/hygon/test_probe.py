"""A Hygon DCU is what a HIP build of torch calls cuda, where the build is Hygon's."""

from __future__ import annotations

from typing import Any

import pytest

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends import hygon


@pytest.mark.parametrize(
    ("gcn", "arch", "features"),
    [("gfx936:sramecc+:xnack-", "gfx936", set()), ("gfx938:sramecc+:xnack-", "gfx938", {"fp8"})],
)
def test_a_dcu(build: Any, gcn: str, arch: str, features: set[str]) -> None:
    build("2.9.0+das.opt1.dtk2604", "BW200", cuda=None, hip="6.1", gcn=gcn)
    found = hygon.probe()
    assert isinstance(found, Device)
    assert (found.type, found.name, found.arch, found.count) == ("cuda", "BW200", arch, 2)
    assert found.features == features
    assert {"hip": "6.1", "torch": "2.9.0+das.opt1.dtk2604"}.items() <= found.versions.items()


def test_a_gpu_of_amd_is_not_one(build: Any) -> None:
    build("2.9.0+rocm6.4", "AMD Instinct MI300X", cuda=None, hip="6.4", gcn="gfx942")
    found = hygon.probe()
    assert isinstance(found, Unavailable)
    assert "a device of AMD cuda" in found.reason


def test_no_device_behind_its_build_is_broken(build: Any) -> None:
    build("2.9.0+das.opt1.dtk2604", "BW200", cuda=None, hip="6.1", count=0)
    found = hygon.probe()
    assert isinstance(found, Unavailable)
    assert "finds no device" in found.reason
    assert "HIP_VISIBLE_DEVICES" in found.fix
    assert found.fault
