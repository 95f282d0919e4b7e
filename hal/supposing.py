"""The installed backends as if their devices were there: what kernels would say on a machine that one does not have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glm5_hal.backend import Device, Kernel
from glm5_hal.catalogue import Catalogue
from glm5_hal.plugins import PluginRecord


class Everything(frozenset[str]):
    """Every feature that anybody may ask for."""

    def __contains__(self, name: object) -> bool:
        return True


class Supposed:
    """A `glm5_hal.resolve.Catalogue` where every backend has a device of architecture ``arch``. Nothing is probed."""

    def __init__(self, catalogue: Catalogue, arch: str) -> None:
        self._catalogue, self._arch = catalogue, arch

    def named(self, name: str) -> Sequence[PluginRecord]:
        return self._catalogue.named(name)

    def of_device(self, device_type: str, *, outside: bool = True) -> Iterator[PluginRecord]:
        return self._catalogue.of_device(device_type, outside=outside)

    def unusable(self) -> Iterator[PluginRecord]:
        return self._catalogue.unusable()

    def device(self, name: str) -> Device:
        kind = self._catalogue.backend(name).device_type
        return Device(kind, f"a supposed {self._arch}", self._arch, features=Everything())

    def kernels(self, name: str, op: str) -> Sequence[Kernel]:
        return self._catalogue.kernels(name, op)
