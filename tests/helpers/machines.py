"""Machines with several vendors' software, made up: what a probe can see of them, and what it touched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "ci"))

from simulated.identities import IDENTITIES, Identity, Packages, extend, versions_of

__all__ = ["IDENTITIES", "QUESTIONS", "Driver", "Identity", "machine", "with_stand_ins"]

#: For tests of stand-in devices.
with_stand_ins = pytest.mark.skipif(
    torch.version.cuda is not None or not hasattr(torch._C, "_acc"),
    reason="a stand-in needs a torch without CUDA, of a version that lets Python be a device",
)

#: What a driver is asked through torch.<type>.
QUESTIONS = ("is_available", "device_count", "get_device_name", "get_device_properties", "get_device_capability")


class Driver:
    """torch.<type> of a vendor, with devices or without; ``asked`` notes whose was asked, and what."""

    def __init__(self, identity: Identity, count: int, asked: list[tuple[str, str]]) -> None:
        self._identity, self._count, self._asked = identity, count, asked

    def _ask(self, what: str) -> None:
        self._asked.append((self._identity.backend or self._identity.vendor, what))
        if what.startswith("get_") and not self._count:
            raise RuntimeError("no device")

    def is_available(self) -> bool:
        self._ask("is_available")
        return self._count > 0

    def device_count(self) -> int:
        self._ask("device_count")
        return self._count

    def get_device_name(self, device: Any = 0) -> str:
        self._ask("get_device_name")
        return self._identity.name

    def get_device_properties(self, device: Any = 0) -> Any:
        self._ask("get_device_properties")
        return SimpleNamespace(name=self._identity.name, **self._identity.properties)

    def get_device_capability(self, device: Any = 0) -> tuple[int, int]:
        self._ask("get_device_capability")
        return self._identity.capability


@contextmanager
def machine(
    installed: Sequence[str],
    runs: str | None,
    *,
    tools: Path,
    loaded: bool = True,
    count: int = 2,
    broken: Callable[[ModuleType], None] | None = None,
) -> Iterator[list[tuple[str, str]]]:
    """The software of several identities, of which one has devices, or none. torch is that one's, or the first's.

    ``loaded``: the extension of the one that runs has been imported, as torch does by itself. ``tools`` is an empty
    folder for commands. ``broken`` is what the extensions do in place of their own. What drivers are asked is noted.
    """
    identities, asked = [IDENTITIES[key] for key in installed], []
    build = IDENTITIES[runs or installed[0]]
    slot = ["privateuseone"]
    with pytest.MonkeyPatch.context() as patch:
        version, about = versions_of(build)
        patch.setattr(torch, "__version__", version)
        patch.setattr(torch, "version", about)
        patch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: slot[0])
        # An ordinary build's is NVIDIA's, and so is one that nothing has taken over.
        own = build.type == "cuda" and (runs or not build.loaded)
        ours = Driver(build, count if runs else 0, asked) if own else Driver(IDENTITIES["nvidia"], 0, asked)
        for question in QUESTIONS:
            patch.setattr(torch.cuda, question, getattr(ours, question))

        def begin(module: ModuleType) -> None:
            if broken is not None:
                broken(module)
                return
            identity = next(i for i in identities if module.__name__ in i.packages)
            if module.__name__ != identity.extension:
                asked.append((identity.backend, "imported"))
                return
            if slot[0] not in ("privateuseone", identity.type):
                raise RuntimeError("torch.rename_privateuse1_backend() has already been called")
            slot[0] = identity.type
            driver = Driver(identity, count if identity is IDENTITIES.get(runs or "") else 0, asked)
            patch.setattr(torch, identity.type, driver, raising=False)
            extend(module, identity, driver)

        packages = {name: v for identity in identities for name, v in identity.packages.items()}
        patch.setattr(sys, "meta_path", [Packages(packages, begin), *sys.meta_path])
        for name in packages:
            patch.delitem(sys.modules, name, raising=False)
        for name in build.loaded if runs else ():
            patch.setitem(sys.modules, name, ModuleType(name))
        for tool in (tool for identity in identities for tool in identity.tools):
            (tools / tool).touch(0o755)
        patch.setenv("PATH", str(tools))
        if runs and loaded and build.extension and broken is None:
            __import__(build.extension)
        asked.clear()
        try:
            yield asked
        finally:
            for name in packages:
                sys.modules.pop(name, None)
