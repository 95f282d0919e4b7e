"""What the repaired interpreter multiplies is what a chip does: a row's bits follow from that row."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

FILE = Path(__file__).resolve().parents[3] / "ci/triton_repairs.py"


@pytest.fixture(scope="module")
def repairs() -> Any:
    spec = importlib.util.spec_from_file_location("repairs", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("M", "K", "N"), [(16, 16, 16), (16, 24, 48), (64, 576, 64), (128, 64, 128)])
def test_a_row_has_the_same_bits_wherever_it_stands(
    repairs: Any, M: int, K: int, N: int, order: str, dtype: Any
) -> None:
    draw = np.random.default_rng(0)
    a = draw.standard_normal((M, K), np.float32).astype(dtype)
    b = np.asarray(draw.standard_normal((K, N), np.float32).astype(dtype), order=order)
    whole = repairs.row_by_row(a, b)
    assert whole.dtype == np.float32
    assert np.allclose(whole, a.astype(np.float64) @ b.astype(np.float64), atol=1e-4)
    for row in (0, 5, M - 1):
        for place in (0, 3, 15):
            tile = np.zeros((16, K), dtype)
            tile[place] = a[row]
            assert np.array_equal(repairs.row_by_row(tile, b)[place], whole[row])
