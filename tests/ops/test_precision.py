"""Products of the storage dtype: one rule for composites and kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_hal.backends._torch.moe import grouped_gemm
from glm5_hal.ops._common.precision import FEW, exact, linear, matmul, multiply

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("rows", [0, 1, FEW, FEW + 1])
@pytest.mark.parametrize("into", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_right_in_every_dtype_and_layout(rows: int, into: bool, dtype: torch.dtype) -> None:
    a, b = numbers(rows, 24, dtype=dtype), numbers(24, 10, dtype=dtype)
    for weight in (b, b.T.contiguous().T):
        out = torch.full((rows, 10), 77.0, dtype=dtype) if into else None
        made = multiply(a, weight, out)
        assert made.dtype == dtype
        assert torch.equal(made.double(), a.double() @ b.double())
        assert out is None or made.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_half_precision_accumulates_in_float32(rows: int) -> None:
    """1 + 2047 · 2^-11: an accumulator of float16 would stay at 1."""
    x = torch.full((rows, 2048), 2.0**-11, dtype=torch.float16)
    x[:, 0] = 1.0
    assert (linear(x, torch.ones(3, 2048, dtype=torch.float16)) == 2.0).all()


class Products(TorchDispatchMode):
    """The dtypes in which matrices were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "weight", "widened"),
    [
        (FEW, "[out, in]", False),
        (FEW + 1, "[out, in]", True),
        (1, "[in, out]", True),
        (1, "per head", True),
    ],
)
def test_only_float16_is_widened_and_only_where_that_pays(
    rows: int, weight: str, widened: bool, dtype: torch.dtype
) -> None:
    a, b = numbers(rows, 24, dtype=dtype), numbers(10, 24, dtype=dtype).T
    if weight == "[in, out]":
        b = b.contiguous()
    if weight == "per head":
        a, b = a.expand(3, rows, 24), b.expand(3, 24, 10)
    with Products() as seen:
        multiply(a, b)
    assert seen.dtypes == [torch.float32 if widened and dtype == torch.float16 else dtype]


def test_grouped_gemm_has_the_same_rule() -> None:
    x, weight = numbers(FEW + 2, 24, dtype=torch.float16), numbers(3, 10, 24, dtype=torch.float16)
    with Products() as seen:
        grouped_gemm.fn(x, weight, torch.tensor([0, 1, 1, FEW + 2], dtype=torch.int32))
    assert seen.dtypes == [torch.float16, torch.float32]


def test_an_exact_run_multiplies_in_float64() -> None:
    a = torch.full((1, 3), 1 + 2.0**-10, dtype=torch.float16)
    with exact():
        assert matmul(a, a.T).item() == 3 * (1 + 2.0**-10) ** 2
