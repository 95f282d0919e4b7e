"""Machines of other vendors, made up: a torch whose attributes are another build's, and an extension of it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let torch be a build whose device is called cuda."""

    def build(
        version: str,
        name: str,
        *,
        cuda: str | None = "11.8",
        hip: str | None = None,
        count: int = 2,
        capability: tuple[int, int] = (8, 0),
        gcn: str = "",
        **more: Any,
    ) -> None:
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda, hip=hip, **more))
        answers = {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "get_device_name": lambda which=0: name,
            "get_device_capability": lambda which=0: capability,
            "get_device_properties": lambda which=0: SimpleNamespace(gcnArchName=gcn),
        }
        for what, answer in answers.items():
            monkeypatch.setattr(torch.cuda, what, answer)

    return build


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let torch have an extension with a device type of its own."""

    def extension(
        module: str, device_type: str, name: str, *, count: int = 2, capability: tuple[int, int] = (3, 1)
    ) -> SimpleNamespace:
        found = ModuleType(module)
        found.__spec__ = ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, module, found)
        space = SimpleNamespace(
            is_available=lambda: count > 0,
            device_count=lambda: count,
            get_device_name=lambda which=0: name,
            get_device_capability=lambda which=0: capability,
        )
        monkeypatch.setattr(torch, device_type, space, raising=False)
        return space

    return extension
