"""One test per conformance case and kernel provider of this backend; `--hal-level` and `--hal-op` choose among them."""

from __future__ import annotations

from glm5_hal.conformance.pytest_plugin import HalCase


def test_conformance(hal_case: HalCase) -> None:
    hal_case.check()
