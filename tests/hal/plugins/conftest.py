import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from .site import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(str(made.folder))
    yield made
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that a hanging plugin waits for, so that its thread ends with the test."""
    file = tmp_path / "gate"
    yield file
    file.touch()
    for thread in threading.enumerate():
        if thread.name.startswith("glm5-hal plugin"):
            thread.join(5)
            assert not thread.is_alive()
