"""What holds for every test, whichever folder it is run from."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("glm5-hal", deadline=None)  # machines are busy, and what is slow is not wrong
hypothesis.settings.load_profile("glm5-hal")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny shapes: a second thread costs more than it gives, and stalls where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
