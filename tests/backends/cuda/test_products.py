"""Products on CUDA are summed in fp32 and rounded once, and the process's switches stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_hal.backends.cuda import products
from glm5_hal.ops._common import products as shared

HALF = (torch.bfloat16, torch.float16)
SWITCHES = torch.backends.cuda.matmul


class Products(TorchDispatchMode):
    """The dtypes in which matrices were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """torch's products, which a CPU does not have with an out_dtype."""
    made: list[tuple[str, torch.dtype]] = []

    def product(name: str) -> Any:
        def multiply(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
            made.append((name, out_dtype))
            return (a.double() @ b.double()).to(out_dtype)

        return multiply

    for name in ("mm", "bmm"):
        monkeypatch.setattr(torch, name, product(name))
    return made


def switches() -> dict[str, Any]:
    """What the process has set."""
    return {name: getattr(SWITCHES, name) for name in products.REDUCED.values()}


@pytest.fixture
def older(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A torch without out_dtype; what the test sets is set back."""
    monkeypatch.setattr(products, "has_out_dtype", lambda: False)
    before = switches()
    yield
    for name, value in before.items():
        setattr(SWITCHES, name, value)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 7)], ids=["mm", "bmm"])
def test_an_fp32_result_is_asked_for_and_rounded_once(
    calls: list[tuple[str, torch.dtype]], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    a, b = torch.randn(*shape[:-1]).to(dtype), torch.randn(*shape[:-3], *shape[-2:]).to(dtype)
    made = products.accumulated(a, b)
    assert calls == [("mm" if len(shape) == 3 else "bmm", torch.float32)]
    assert made.dtype == dtype
    assert torch.equal(made, (a.double() @ b.double()).float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_products_are_torchs_own(calls: list[Any], dtype: torch.dtype) -> None:
    a = torch.randn(3, 4, dtype=dtype)
    assert torch.equal(products.accumulated(a, a.T), a @ a.T)
    assert calls == []


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_multiply(shape: tuple[int, int]) -> None:
    a = torch.ones(shape, dtype=torch.bfloat16)
    assert products.accumulated(a, torch.ones(shape[1], 2, dtype=torch.bfloat16)).shape == (shape[0], 2)


@pytest.mark.usefixtures("older")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("reduced", [True, False], ids=["torch's default", "the user forbids it"])
def test_an_older_torch_multiplies_in_fp32_unless_it_may_not_round_on_the_way(
    reduced: bool, dtype: torch.dtype
) -> None:
    setattr(SWITCHES, products.REDUCED[dtype], reduced)
    a = torch.randn(3, 4).to(dtype)
    with Products() as seen:
        assert products.accumulated(a, a.T).dtype == dtype
    assert seen.dtypes == [torch.float32 if reduced else dtype]


def test_no_switch_is_touched(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PRODUCTS", {})
    before = switches()
    products.install()
    products.accumulated(torch.ones(2, 3).bfloat16(), torch.ones(3, 2).bfloat16())
    assert switches() == before


def test_every_product_of_the_ops_on_such_a_device_is_one_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PRODUCTS", {})
    products.install()
    assert {"cuda": products.accumulated} == shared.PRODUCTS
    monkeypatch.setattr(shared, "PRODUCTS", {"cpu": lambda a, b: a @ b + 1})
    a, out = torch.ones(2, 3), torch.empty(2, 2)
    assert (shared.linear(a, a) == 4).all()
    assert shared.multiply(a, a.T, out) is out
    assert (out == 4).all()
