"""Where references round: nowhere in an exact run."""

from __future__ import annotations

import torch

from glm5_hal.ops._common import products
from glm5_hal.ops._common.precision import exact, linear, matmul


def test_an_exact_run_multiplies_in_float64() -> None:
    a = torch.full((1, 3), 1 + 2.0**-10, dtype=torch.float16)
    with exact():
        assert matmul(a, a.T).item() == linear(a, a).item() == 3 * (1 + 2.0**-10) ** 2


def test_any_other_run_multiplies_as_kernels_do() -> None:
    a = torch.randn(3, 512)
    weight = torch.randn(512, 512)
    assert torch.equal(linear(a, weight), products.linear(a, weight))
    assert torch.equal(matmul(a, weight), products.multiply(a, weight))
