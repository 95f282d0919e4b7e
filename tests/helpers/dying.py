"""A worker for `ci/triton_workers.py` that is taken down by one of its units."""

from __future__ import annotations

import os
from typing import Any


def work(unit: Any) -> Any:
    from triton_workers import Found

    if unit.op == "dies":
        os._exit(7)
    return Found(taken={("chip", unit.op, "triton"): 1})  # type: ignore[arg-type]
