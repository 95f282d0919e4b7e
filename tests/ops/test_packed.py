"""Weights that oneDNN has reordered once lie beside the plain ones, and never give another result than those would."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_hal.ops._common.packed import LARGE, pack, packed
from glm5_hal.ops._common.products import linear

BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(
        torch.bfloat16, id="bfloat16", marks=pytest.mark.skipif(not BFLOAT16, reason="no bfloat16 in oneDNN here")
    ),
]

x86 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="a CPU without AVX2 has torch's products"
)


def weights(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(520, 640, generator=torch.Generator().manual_seed(0)).to(dtype)


class Layouts(TorchDispatchMode):
    """In which layout weights were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.layout] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "_linear_pointwise"):
            self.seen.append(args[1].layout)
        return func(*args, **(kwargs or {}))


def reads_packed(call: Callable[[], Any]) -> bool:
    with Layouts() as layouts:
        call()
    return layouts.seen == [torch._mkldnn]  # type: ignore[attr-defined]


@x86
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_right_and_rounded_once(dtype: torch.dtype, rows: int) -> None:
    weight = pack(weights(dtype))
    x = torch.randn(rows, 640, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert reads_packed(lambda: linear(x, weight))
    made, truth = linear(x, weight), x.double() @ weight.double().T
    sums = 1e-6 * (x.double().abs() @ weight.double().abs().T)
    assert made.dtype == dtype
    assert ((made.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + sums).all()
    assert torch.equal(linear(x, weight), made)


@x86
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_stay_in_float32_and_a_nan_is_not_lost(dtype: torch.dtype) -> None:
    """1 + 16383 · 2^-13 is just below 3: an accumulator of half precision would stay below 2."""
    weight = torch.ones(32, 16384, dtype=dtype)
    weight[3, 7] = torch.nan
    pack(weight)
    x = torch.full((1, 16384), 2.0**-13, dtype=dtype)
    x[:, 0], x[:, 7] = 1.0, 0.0
    assert reads_packed(lambda: linear(x, weight))
    made = linear(x, weight)
    assert made.isnan().nonzero().tolist() == [[0, 3]]
    assert (made[0, [0, 1, 2, 31]].double() - 3.0).abs().max() < 2e-2


@x86
@pytest.mark.parametrize("shape", [(3, 640), (2, 3, 640), (0, 640), (2, 0, 640)])
def test_rows_come_in_any_shape(shape: tuple[int, ...]) -> None:
    weight = pack(weights())
    x = torch.randn(shape)
    assert linear(x, weight).shape == (*shape[:-1], 520)
    assert torch.allclose(linear(x, weight), x @ weight.T, atol=1e-4)
    apart = torch.randn(*shape[:-1], 1280)[..., ::2]
    assert torch.allclose(linear(apart, weight), apart @ weight.T, atol=1e-4)


@x86
def test_weights_that_were_written_since_are_read_as_they_are() -> None:
    weight, x = pack(weights()), torch.randn(3, 640)
    weight[0] = 0.0
    assert packed(weight) is None
    assert (linear(x, weight)[:, 0] == 0.0).all()
    pack(weight)
    assert reads_packed(lambda: linear(x, weight))
    assert (linear(x, weight)[:, 0] == 0.0).all()


@x86
def test_a_parameters_writes_are_seen_through_what_was_detached_of_it() -> None:
    module = torch.nn.Linear(640, 520, bias=False)
    weight = pack(module.weight.detach())
    assert packed(weight) is not None
    module.load_state_dict({"weight": torch.zeros(520, 640)})
    assert packed(weight) is None


@x86
def test_weights_that_were_given_other_data_are_read_as_they_are() -> None:
    """As Module.to and many loaders do it: no write is counted then."""
    module, x = torch.nn.Linear(640, 520, bias=False), torch.randn(3, 640)
    pack(module.weight)
    module.weight.data = torch.zeros(520, 640)
    with torch.no_grad():
        assert (linear(x, module.weight) == 0.0).all()
    pack(module.weight)
    module.to(torch.bfloat16)
    with torch.no_grad():
        assert (linear(x.bfloat16(), module.weight) == 0.0).all()


@x86
def test_a_copy_begins_without() -> None:
    weight = pack(weights())
    for other in (copy.deepcopy(weight), weight.clone(), weight.detach(), weight.view(520, 640)):
        assert packed(other) is None
    assert packed(weight) is not None


@x86
def test_nothing_is_kept_longer_than_the_plain_weights() -> None:
    from glm5_hal.ops._common import packed as module

    gc.collect()
    before = len(module._packed)
    weight = pack(weights())
    assert len(module._packed) == before + 1
    del weight
    gc.collect()
    assert len(module._packed) == before


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.randn(64, 64), id="small"),
        pytest.param(torch.randn(LARGE), id="a vector"),
        pytest.param(torch.randn(4, 512, 512), id="per head"),
        pytest.param(torch.randn(640, 520).T, id="[in, out]"),
        pytest.param(torch.randn(520, 640).double(), id="float64"),
        pytest.param(torch.randn(520, 640).half(), id="float16"),
        pytest.param(torch.empty(520, 640, device="meta"), id="on another device"),
    ],
)
def test_what_would_gain_nothing_is_left_alone(weight: Tensor) -> None:
    assert pack(weight) is weight
    assert packed(weight) is None


@x86
def test_only_a_plain_call_reads_them() -> None:
    weight, x = pack(weights()), torch.randn(3, 640)
    assert not reads_packed(lambda: linear(x.double(), weight.double()))
    leaf = x.clone().requires_grad_()
    assert not reads_packed(lambda: linear(leaf, weight))
    with torch.no_grad():
        assert reads_packed(lambda: linear(leaf, weight))
    torch._C._set_mkldnn_enabled(False)
    try:
        assert not reads_packed(lambda: linear(x, weight))
        assert packed(pack(weights())) is None
    finally:
        torch._C._set_mkldnn_enabled(True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(x), weight).shape == (3, 520)


@x86
def test_torch_compile_reads_the_plain_ones() -> None:
    weight, x, targets = pack(weights()), torch.randn(3, 640), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    made = torch.compile(lambda: linear(x, weight), backend=backend, fullgraph=True)()
    assert any("matmul" in name for name in targets)
    assert not any("pointwise" in name for name in targets)
    assert torch.allclose(made, linear(x, weight), atol=1e-4)


@x86
def test_inference_mode_packs_and_reads_too() -> None:
    with torch.inference_mode():
        weight, x = pack(weights()), torch.randn(3, 640)
        assert reads_packed(lambda: linear(x, weight))
    ordinary = pack(weights())
    with torch.inference_mode():
        assert reads_packed(lambda: linear(torch.randn(3, 640), ordinary))
