"""Products of the storage dtype: one rule for composites, kernels and integrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_hal.backends._torch.moe import grouped_gemm
from glm5_hal.ops._common.products import BAGS, FEW, linear, multiply

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
    """Which functions multiplied matrices, in which dtypes, and how many rows."""

    NAMES = ("mm", "bmm", "_linear_pointwise", "_embedding_bag_forward_only")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: list[torch.dtype] = []
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.names.append(name)
            self.dtypes.append(args[0].dtype)
            self.rows.append(args[0].shape[-2])
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


# --- large weights on an x86 CPU -------------------------------------------------------------------------------------

x86 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="a CPU without AVX2 has torch's products"
)


def used(call: Callable[[], Any]) -> list[str]:
    with Products() as seen:
        call()
    return seen.names


@pytest.mark.parametrize("into", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_a_product_over_large_weights_is_right(rows: int, into: bool) -> None:
    x, weight = numbers(rows, 640, dtype=torch.float32), numbers(520, 640, dtype=torch.float32)
    out = torch.full((rows, 520), 77.0) if into else None
    made = multiply(x, weight.T, out)
    assert torch.equal(made.double(), x.double() @ weight.double().T)
    assert out is None or made.data_ptr() == out.data_ptr()


@x86
def test_large_float32_weights_go_to_onednn_unless_it_would_be_slow_or_not_be_seen() -> None:
    x, weight = torch.randn(3, 512), torch.randn(512, 512)
    apart, leaf = torch.randn(3, 1024)[:, ::2], torch.randn(512, 512, requires_grad=True)
    assert used(lambda: linear(x, weight)) == ["_linear_pointwise"]
    assert used(lambda: linear(x, weight[:511])) == ["mm"]  # small
    assert used(lambda: linear(apart, weight)) == ["mm"]
    assert used(lambda: linear(x, torch.randn(512, 1024)[:, ::2])) == ["mm"]
    assert used(lambda: multiply(x, weight)) == ["mm"]  # [in, out]
    assert used(lambda: linear(x.double(), weight.double())) == ["mm"]
    assert used(lambda: linear(x, leaf)) == ["mm"]
    with torch.no_grad():
        assert used(lambda: linear(x, leaf)) == ["_linear_pointwise"]
    torch._C._set_mkldnn_enabled(False)
    try:
        assert used(lambda: linear(x, weight)) == ["mm"]
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="torch multiplies it without oneDNN")
@x86
@pytest.mark.parametrize("into", [False, True], ids=["new", "out"])
def test_one_row_of_bfloat16_is_multiplied_twice_over_huge_weights_alone(into: bool) -> None:
    x, weight = numbers(3, 2048, dtype=torch.bfloat16), numbers(1024, 2048, dtype=torch.bfloat16)
    out = torch.full((1, 1024), 77.0, dtype=torch.bfloat16) if into else None
    with Products() as seen:
        made = multiply(x[1:2], weight.T, out)
        linear(x[1:2], weight[:1023])
        linear(x[:2], weight)
    assert seen.rows == [2, 1, 2]
    assert made.shape == (1, 1024)
    assert torch.equal(made, (x @ weight.T)[1:2])
    assert out is None or made.data_ptr() == out.data_ptr()


def test_more_dims_than_two_are_rows() -> None:
    x, weight = torch.randn(2, 3, 512), torch.randn(513, 512)
    assert torch.equal(linear(x, weight), linear(x.flatten(0, 1), weight).view(2, 3, 513))
    assert linear(x[:0], weight).shape == (0, 3, 513)


@x86
@pytest.mark.parametrize("dtype", BAGS, ids=str)
def test_few_rows_of_each_head_read_its_weights_as_bags(dtype: torch.dtype) -> None:
    weights = torch.randn(8, 96, 512).to(dtype)
    for rows in (1, BAGS[dtype], BAGS[dtype] + 1):
        q = torch.randn(rows, 8, 96).to(dtype).transpose(0, 1)
        bags = used(lambda: multiply(q, weights)) == ["_embedding_bag_forward_only"]  # noqa: B023
        assert bags == (rows <= BAGS[dtype])
        made, truth = multiply(q, weights), q.double() @ weights.double()
        sums = 1e-6 * (q.double().abs() @ weights.double().abs())
        assert ((made.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + sums).all()
    assert used(lambda: multiply(q[:, :1], weights.transpose(1, 2).contiguous().transpose(1, 2))) != [
        "_embedding_bag_forward_only"
    ]


@pytest.mark.parametrize("dtype", BAGS, ids=str)
def test_bags_accumulate_in_float32_and_lose_no_nan(dtype: torch.dtype) -> None:
    """1 + 4095 · 2^-11 is just below 3: an accumulator of half precision would stay below 2."""
    q, weights = torch.full((1, 1, 4096), 2.0**-11, dtype=dtype), torch.ones(1, 4096, 64, dtype=dtype)
    q[..., 0] = 1.0
    assert (multiply(q, weights).double() - 3.0).abs().max() < 2e-2
    q[..., 7], weights[0, 7, 3] = 0.0, torch.nan
    assert multiply(q, weights).isnan().nonzero().tolist() == [[0, 0, 3]]


@x86
def test_nothing_is_kept_from_a_product_of_made_up_tensors() -> None:
    """Of a first call under a fake mode, or with another default device, nothing may reach the next one."""
    with FakeTensorMode(), torch.device("meta"):
        multiply(torch.empty(8, 1, 112, device="cpu"), torch.empty(8, 112, 512, device="cpu"))
    q, heads = torch.randn(8, 1, 112), torch.randn(8, 112, 512)
    assert torch.allclose(multiply(q, heads), q @ heads, atol=1e-4)


@x86
def test_torch_compile_sees_products_it_knows() -> None:
    x, weight, q, heads = torch.randn(3, 512), torch.randn(512, 512), torch.randn(8, 1, 96), torch.randn(8, 96, 512)
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda: (linear(x, weight), multiply(q, heads)), backend=backend, fullgraph=True)
    compiled()
    assert not any("pointwise" in name or "embedding" in name for name in found)
    assert any("matmul" in name for name in found)
