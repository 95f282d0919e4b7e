"""The emulated npu_grouped_matmul in both overloads: float64, and what its page refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from ci.ascend import emulator  # noqa: E402
from ci.ascend.emulator.samples import Arguments, sample  # noqa: E402

npu = torch.ops.npu
BF16 = torch.bfloat16
GMM, LIST = "npu_grouped_matmul", "npu_grouped_matmul.List"


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


def close(actual: Tensor, expected: Tensor, rtol: float = 2**-7) -> None:
    assert actual.shape == expected.shape
    assert torch.allclose(actual.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.abs().max()))


def products(given: Arguments, sizes: list[int]) -> Tensor:
    x, weight = given["x"][0].double(), given["weight"]
    weights = list(weight[0]) if weight[0].dim() == 3 else weight
    return torch.cat([a @ b.double() for a, b in zip(x.split(sizes), weights, strict=True)])


def test_an_output_dtype_may_be_torch_s() -> None:
    given = sample(GMM, "int8")
    (expected,) = npu.npu_grouped_matmul(**given)
    assert torch.equal(npu.npu_grouped_matmul(**{**given, "output_dtype": BF16})[0], expected)


@pytest.mark.parametrize(("kind", "sizes"), [(0, [4, 4, 10]), (1, [4, 0, 6])])
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_grouped_matmul(kind: int, sizes: list[int], several: bool, dtype: torch.dtype) -> None:
    given = {**sample(GMM), "group_list": torch.tensor(sizes), "group_list_type": kind}
    bias = torch.randn(3, 48).to(torch.float32 if dtype is BF16 else dtype)
    given.update(x=[given["x"][0].to(dtype)], weight=[given["weight"][0].to(dtype)], bias=[bias])
    if several:
        given.update(weight=list(given["weight"][0]), bias=list(bias))
    (y,) = npu.npu_grouped_matmul(**given)
    expected = products(given, [4, 0, 6]) + bias.double().repeat_interleave(torch.tensor([4, 0, 6]), 0)
    close(y, expected)
    assert y.dtype is dtype


def test_weights_may_be_transposed_and_in_fractal_nz() -> None:
    given = sample(GMM)
    (expected,) = npu.npu_grouped_matmul(**given)
    given["weight"] = [npu.npu_format_cast(given["weight"][0].transpose(1, 2), 29).transpose(1, 2)]
    (y,) = npu.npu_grouped_matmul(**given)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("act", [0, 5])
@pytest.mark.parametrize(("scale", "number"), [(BF16, 15), (torch.float32, 5)])
def test_per_token_quantised_products_are_exact_before_they_are_scaled(
    act: int, scale: torch.dtype, number: int
) -> None:
    given = {**sample(GMM, "int8"), "act_type": act, "output_dtype": number}
    given["scale"] = [given["scale"][0].to(scale)]
    given["bias"] = [torch.randint(-99, 99, (3, 48), dtype=torch.int32)]
    (y,) = npu.npu_grouped_matmul(**given)
    groups = torch.tensor([4, 0, 6])
    exact = products(given, groups.tolist()) + given["bias"][0].double().repeat_interleave(groups, 0)
    exact = (
        exact * given["scale"][0].double().repeat_interleave(groups, 0) * given["per_token_scale"][0].double()[:, None]
    )
    close(y, exact / (1 + (-exact).exp()) if act else exact)
    assert y.dtype is {15: BF16, 5: torch.float16}[number]


def test_per_channel_scales_come_packed_in_int64() -> None:
    given = sample(GMM, "int8")
    scale = torch.rand(3, 48) / 500
    packed = scale.view(torch.int32).long() | 0x400000000000
    given.update(scale=[packed], per_token_scale=None, output_dtype=None)
    (y,) = npu.npu_grouped_matmul(**given)
    exact = products(given, [4, 0, 6]) * scale.double().repeat_interleave(torch.tensor([4, 0, 6]), 0)
    assert y.dtype is torch.int8
    assert ((y.double() - exact.clamp(-128, 127)).abs() <= 0.5 + 1e-3).all()


def test_antiquantised_weights() -> None:
    given = sample(GMM)
    weight = torch.randint(-127, 128, (3, 32, 48), dtype=torch.int8)
    scale, offset = (torch.rand(3, 48) / 100).to(BF16), torch.randn(3, 48).to(BF16)
    given.update(weight=[weight], antiquant_scale=[scale], antiquant_offset=[offset])
    (y,) = npu.npu_grouped_matmul(**given)
    meant = {"x": given["x"], "weight": [((weight.double() + offset.double()[:, None]) * scale.double()[:, None])]}
    close(y, products(meant, [4, 0, 6]), 2**-5)


def test_pairs_name_the_groups_that_have_rows() -> None:
    given = sample(GMM, "int8")
    (expected,) = npu.npu_grouped_matmul(**given)
    pairs = torch.tensor([[0, 4], [1, 0], [2, 6]])
    (y,) = npu.npu_grouped_matmul(**{**given, "group_list": pairs, "group_list_type": 2})
    assert torch.equal(y, expected)


def test_groups_along_k() -> None:
    x, weight = torch.randn(8, 30).half(), torch.randn(30, 16).half()
    (y,) = npu.npu_grouped_matmul([x], [weight], group_list=torch.tensor([7, 7, 30]), split_item=3, group_type=2)
    expected = [a.double() @ b.double() for a, b in zip(x.split([7, 0, 23], 1), weight.split([7, 0, 23]), strict=True)]
    close(y, torch.stack(expected))


def test_products_of_their_own() -> None:
    x = [torch.randn(3, 5, 16).half(), torch.randn(2, 7, 32).half()]
    weight = [torch.randn(16, 24).half(), torch.randn(32, 8).half()]
    y = npu.npu_grouped_matmul(x, weight, split_item=0, group_type=-1)
    for out, a, b in zip(y, x, weight, strict=True):
        close(out, a.double() @ b.double())


@pytest.mark.parametrize("split_item", [0, 3])
@pytest.mark.parametrize("output_dtype", [None, BF16])
def test_group_lists_of_numbers(split_item: int, output_dtype: torch.dtype | None) -> None:
    given = {**sample("npu_grouped_matmul.List"), "split_item": split_item, "output_dtype": output_dtype}
    y = npu.npu_grouped_matmul.List(**given)
    expected = products(given, [4, 0, 6])
    close(torch.cat(y), expected)
    assert [len(part) for part in y] == ([10] if split_item else [4, 0, 6])


Change = Callable[[Arguments], Any]

REFUSED: list[tuple[str, dict[str, Any] | Change, str]] = [
    (GMM, {"group_type": None}, "group_type is given"),
    (GMM, {"group_type": 1}, "group_type is one of"),
    (GMM, {"group_list_type": 3}, "group_list_type is one of"),
    (GMM, {"group_list_type": 2}, "group_list_type 2 is for int8"),
    (GMM, {"split_item": 0}, "split_item is one of"),
    (GMM, {"split_item": 4}, "split_item is one of"),
    (GMM, {"group_list": None}, "group_list is given"),
    (GMM, {"group_list": torch.tensor([4, 0, 6], dtype=torch.int32)}, "group_list has dtype"),
    (GMM, {"group_list": torch.tensor([4, 0, 5])}, "hold all 10 rows"),
    (GMM, {"group_list": torch.tensor([4, -2, 8])}, "not negative"),
    (GMM, {"group_list": torch.tensor([4, 6])}, "an element for each of 3 groups"),
    (GMM, {"group_list": torch.tensor([5, 4, 10]), "group_list_type": 0}, "does not fall"),
    (GMM, lambda a: a.update(weight=[a["weight"][0][:1]], group_list=torch.tensor([10])), "not 1 element"),
    (GMM, {"x": []}, "1 to 128 tensors"),
    (GMM, {"x": [torch.zeros(10, 16).to(BF16)]}, "K of x is K of weight"),
    (GMM, {"x": [torch.zeros(32, 10).to(BF16).T]}, "x is contiguous"),
    (GMM, {"x": [torch.zeros(2, 5, 32).to(BF16)]}, "x has 2 dims"),
    (GMM, {"weight": [torch.zeros(3, 32, 48).half()]}, "weight has x's dtype"),
    (GMM, {"weight": [torch.zeros(3, 32, 65536).to(BF16)]}, "last dim of weight is below"),
    (GMM, {"bias": [torch.zeros(3, 48).to(BF16)]}, "bias is torch.float32"),
    (GMM, {"bias": [torch.zeros(48)]}, "bias has shape"),
    (GMM, {"bias": [torch.zeros(3, 48), torch.zeros(3, 48)]}, "bias has 1 tensors"),
    (GMM, {"scale": [torch.zeros(3, 48)]}, "scale is None"),
    (GMM, {"offset": [torch.zeros(3, 48)]}, "offset is None"),
    (GMM, {"act_type": 5}, "act_type is for per-token"),
    (GMM, {"act_type": 3}, "act_type is one of"),
    (GMM, {"output_dtype": 6}, "output_dtype is None or"),
    (GMM, {"tuning_config": [10]}, "tuning_config is for int8"),
    (GMM, {"group_type": -1, "split_item": 0}, "group_list is None"),
    (GMM, {"weight": [torch.zeros(3, 32, 48, dtype=torch.int8)]}, "antiquant_scale is given"),
    (LIST, {"group_list": [10]}, "not 1 element"),
    (LIST, {"group_list": [5, 4, 10]}, "does not fall"),
    (LIST, {"group_list": [4, 4, 9]}, "hold all 10 rows"),
    (LIST, {"group_list": None}, "group_list is given"),
    (LIST, {"group_type": 0}, "group_type is None"),
    (LIST, {"act_type": 5}, "act_type is None or its default"),
    (LIST, {"weight": [torch.zeros(3, 32, 48).to(BF16)]}, "weights have 2 dims"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_what_is_refused(name: str, change: dict[str, Any] | Change, words: str) -> None:
    given = sample(name)
    refuse(name, given, change, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_dtype": None}, "output_dtype is one of"),
        ({"output_dtype": 5}, "output_dtype is one of"),
        ({"scale": None}, "scale is given"),
        ({"scale": [torch.ones(3, 32).to(BF16)]}, "scale has shape"),
        ({"scale": [torch.ones(3, 48).half()]}, "scale has dtype"),
        ({"per_token_scale": [torch.ones(9)]}, "per_token_scale has shape"),
        ({"per_token_scale": [torch.ones(10).to(BF16)]}, "per_token_scale has dtype"),
        ({"bias": [torch.zeros(3, 48)]}, "bias is torch.int32"),
        ({"weight": [torch.zeros(3, 32, 48).to(BF16)]}, "weight is int8"),
    ],
)
def test_what_int8_products_refuse(change: Arguments, words: str) -> None:
    refuse(GMM, sample(GMM, "int8"), change, words)


def refuse(name: str, given: Arguments, change: dict[str, Any] | Change, words: str) -> None:
    if callable(change):
        change(given)
    else:
        given.update(change)
    base, _, overload = name.partition(".")
    with pytest.raises(emulator.ConstraintError, match=words):
        getattr(getattr(npu, base), overload or "default")(**given)


def test_what_is_left_out_says_so() -> None:
    with pytest.raises(emulator.NotEmulatedError, match="int4"):
        npu.npu_grouped_matmul(**{**sample(GMM), "weight": [torch.zeros(3, 32, 6, dtype=torch.int32)]})
