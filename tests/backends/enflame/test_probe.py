"""An Enflame GCU is what torch_gcu has."""

from __future__ import annotations

from typing import Any

from glm5_hal.backend import Device
from glm5_hal.backends import enflame
from glm5_hal.backends._triton.tuning import tuning


def test_a_gcu(extension: Any) -> None:
    extension("torch_gcu", "gcu", "Enflame S60", capability=(13, 0))
    found = enflame.probe()
    assert isinstance(found, Device)
    assert (found.type, found.name, found.arch, found.count) == ("gcu", "Enflame S60", "gcu_130", 2)


def test_its_triton_addresses_with_32_bits() -> None:
    assert not tuning("gcu_130", enflame.TUNING).int64
