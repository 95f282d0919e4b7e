"""Emulated norms, activations, rotations and scatters: their maths in float64, and what their pages refuse."""

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
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ULP = {BF16: 2**-8, F16: 2**-10, F32: 2**-22}


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


def near(actual: Tensor, expected: Tensor, ulps: float = 1.0) -> None:
    bound = expected.abs() * ULP[actual.dtype] * ulps + expected.abs().max() * 1e-6
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("dims", [1, 2])
def test_rms_norm(dtype: torch.dtype, dims: int) -> None:
    x, gamma = torch.randn(3, 8, 64).to(dtype), torch.randn(8, 64)[(0,) * (2 - dims)].to(dtype)
    y, rstd = npu.npu_rms_norm(x, gamma, 1e-3)
    over = (1, 2) if dims == 2 else (2,)
    expected = (x.double().pow(2).mean(over, keepdim=True) + 1e-3).pow(-0.5)
    near(rstd, expected, 4)
    near(y, x.double() * expected * gamma.double())
    assert y.dtype is dtype
    assert rstd.dtype is F32


def test_rms_norm_of_a_16_bit_input_takes_a_float32_gamma() -> None:
    x, gamma = torch.randn(4, 64).half(), torch.randn(64)
    y, _ = npu.npu_rms_norm(x, gamma)
    near(y, x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5) * gamma.double())


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_add_rms_norm_normalises_the_rounded_sum(dtype: torch.dtype) -> None:
    x1, x2, gamma = (torch.randn(*shape).to(dtype) for shape in ((4, 64), (4, 64), (64,)))
    y, rstd, total = npu.npu_add_rms_norm(x1, x2, gamma, 1e-5)
    assert torch.equal(total, x1 + x2)
    expected = (total.double().pow(2).mean(-1, keepdim=True) + 1e-5).pow(-0.5)
    near(rstd, expected, 4)
    near(y, total.double() * expected * gamma.double())


@pytest.mark.parametrize("dim", [-1, 0])
def test_swiglu(dim: int) -> None:
    x = torch.randn(6, 8).to(BF16)
    gate, up = x.double().chunk(2, dim)
    near(npu.npu_swiglu(x, dim), gate / (1 + (-gate).exp()) * up)


def test_interleave_rope_reads_pairs_and_writes_halves() -> None:
    given = sample("npu_interleave_rope")
    x, cos, sin = (given[name].double() for name in ("x", "cos", "sin"))
    even, odd = x[..., 0::2], x[..., 1::2]
    first, second = cos[..., :32] * even - sin[..., :32] * odd, cos[..., 32:] * odd + sin[..., 32:] * even
    near(npu.npu_interleave_rope(**given), torch.cat((first, second), -1), 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """Rotation of complex numbers, whose parts lie half a row apart, or side by side."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    d = x.shape[-1]
    real = torch.arange(d // 2) * (1 if mode == "half" else 2)
    imaginary = real + (d // 2 if mode == "half" else 1)
    out = torch.empty_like(x)
    out[..., real] = x[..., real] * cos[..., real] - x[..., imaginary] * sin[..., real]
    out[..., imaginary] = x[..., imaginary] * cos[..., imaginary] + x[..., real] * sin[..., imaginary]
    return out


@pytest.mark.parametrize("case", ["plain", "interleave", "TND"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_rotary_mul(case: str, dtype: torch.dtype) -> None:
    given = sample("npu_rotary_mul", case)
    given.update({name: given[name].to(dtype) for name in ("input", "r1", "r2")})
    expected = rotated(given["input"], given["r1"], given["r2"], given["rotary_mode"])
    out = npu.npu_rotary_mul(**given)
    assert (out.double() - expected).abs().max() <= 4 * ULP[dtype] * expected.abs().max()


@pytest.mark.parametrize(
    ("x", "r", "mode"),
    [
        ((2, 20, 5, 128), (1, 20, 1, 128), "half"),  # shapes of the vendor's tests, smaller
        ((20, 2, 5, 128), (20, 1, 1, 128), "half"),
        ((20, 4, 8, 64), (20, 4, 1, 64), "half"),
        ((2, 24, 5, 128), (1, 1, 5, 128), "interleave"),
        ((64, 8, 8, 512), (1, 1, 8, 512), "interleave"),
        ((5, 10, 32), (5, 1, 32), "half"),
    ],
)
def test_layouts_of_the_vendor_s_tests_are_taken(x: tuple[int, ...], r: tuple[int, ...], mode: str) -> None:
    values, cos, sin = torch.rand(x), torch.rand(r), torch.rand(r)
    out = npu.npu_rotary_mul(values, cos, sin, mode)
    assert torch.allclose(out.double(), rotated(values, cos, sin, mode), atol=1e-5)


def test_rotary_mul_with_a_rotation_matrix_is_the_half_mode() -> None:
    given = sample("npu_rotary_mul")
    d = given["input"].shape[-1]
    matrix = torch.zeros(d, d, dtype=BF16)
    matrix[: d // 2, d // 2 :], matrix[d // 2 :, : d // 2] = torch.eye(d // 2), -torch.eye(d // 2)
    assert torch.equal(npu.npu_rotary_mul(**given, rotate=matrix), npu.npu_rotary_mul(**given))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_scatter_nd_update_writes_its_rows_and_no_others(index_dtype: torch.dtype) -> None:
    cache = torch.zeros(4, 5, 6)
    indices = torch.tensor([[0, 4], [3, 1], [2, 2]], dtype=index_dtype)
    updates = torch.randn(3, 6)
    expected = cache.clone()
    for (a, b), row in zip(indices.tolist(), updates, strict=True):
        expected[a, b] = row
    out = npu.npu_scatter_nd_update_(cache, indices, updates)
    assert out.data_ptr() == cache.data_ptr()
    assert torch.equal(cache, expected)


def test_scatter_nd_update_reaches_through_a_view() -> None:
    cache = torch.zeros(2, 4, 1, 8, dtype=BF16)
    npu.npu_scatter_nd_update_(cache.view(-1, 8), torch.tensor([[5]]), torch.ones(1, 8, dtype=BF16))
    assert cache[1, 1].sum() == 8
    assert cache.sum() == 8


def test_equal_duplicates_scatter() -> None:
    cache = torch.zeros(4, 2)
    npu.npu_scatter_nd_update_(cache, torch.tensor([[1], [1]]), torch.ones(2, 2))
    assert cache[1].tolist() == [1, 1]


#: Integers whose bits are NaNs with a payload.
NANS = {F32: (torch.int32, 0x7FC00123), F16: (torch.int16, 0x7E45), BF16: (torch.int16, 0x7FC5)}


def nans(dtype: torch.dtype, *shape: int) -> Tensor:
    bits, pattern = NANS[dtype]
    return torch.full(shape, pattern, dtype=bits).view(dtype)


@pytest.mark.parametrize("dtype", NANS)
def test_duplicates_are_equal_where_their_bits_are(dtype: torch.dtype) -> None:
    cache = torch.zeros(4, 3, dtype=dtype)
    rows = torch.cat((torch.ones(3, 1).to(dtype), nans(dtype, 3, 1), torch.full((3, 1), -0.0).to(dtype)), 1)
    npu.npu_scatter_nd_update_(cache, torch.tensor([[1], [3], [1]]), rows)
    bits, _ = NANS[dtype]
    assert torch.equal(cache[[1, 3]].view(bits), rows[:2].view(bits))
    assert (cache[[0, 2]] == 0).all()


@pytest.mark.parametrize("dtype", NANS)
@pytest.mark.parametrize("case", ["zeros of both signs", "NaNs of both signs", "a NaN and a number", "numbers"])
def test_duplicates_of_other_bits_are_refused(dtype: torch.dtype, case: str) -> None:
    bits, _ = NANS[dtype]
    nan, negative = nans(dtype, 1), (nans(dtype, 1).view(bits) | torch.iinfo(bits).min).view(dtype)
    zero, one = torch.zeros(1).to(dtype), torch.ones(1).to(dtype)
    first, second = {
        "zeros of both signs": (zero, -zero),
        "NaNs of both signs": (nan, negative),
        "a NaN and a number": (nan, one),
        "numbers": (zero, one),
    }[case]
    cache = torch.zeros(4, 2, dtype=dtype)
    updates = torch.stack([torch.cat((one, last)) for last in (first, one, second)])
    with pytest.raises(emulator.ConstraintError, match="write the same values"):
        npu.npu_scatter_nd_update_(cache, torch.tensor([[1], [3], [1]]), updates)
    assert (cache == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64])
def test_duplicates_of_integers(dtype: torch.dtype) -> None:
    cache, index = torch.zeros(4, 2, dtype=dtype), torch.tensor([[1], [1]])
    with pytest.raises(emulator.ConstraintError, match="write the same values"):
        npu.npu_scatter_nd_update_(cache, index, torch.tensor([[1, 1], [1, 0]]).to(dtype))
    npu.npu_scatter_nd_update_(cache, index, torch.tensor([[1, 0], [1, 0]]).to(dtype))
    assert cache.tolist() == [[0, 0], [1, 0], [0, 0], [0, 0]]


Change = Callable[[Arguments], Any]

REFUSED: list[tuple[str, dict[str, Any] | Change, str]] = [
    ("npu_rms_norm", {"input": torch.randn(4, 64).double()}, "input has dtype"),
    ("npu_rms_norm", {"input": torch.randn(64).to(BF16)}, "2 to 8 dims"),
    ("npu_rms_norm", {"gamma": torch.randn(32).to(BF16)}, "gamma's shape"),
    ("npu_rms_norm", {"gamma": torch.randn(64).half()}, "gamma has input's dtype"),
    ("npu_rms_norm", {"input": torch.randn(2, 64)}, "gamma has input's dtype"),
    ("npu_add_rms_norm", {"x2": torch.randn(4, 64)}, "one dtype"),
    ("npu_add_rms_norm", {"gamma": torch.randn(64)}, "one dtype"),
    ("npu_add_rms_norm", {"x2": torch.randn(2, 64).to(BF16)}, "x2 has shape"),
    ("npu_add_rms_norm", {"x1": torch.empty(0, 64).to(BF16), "x2": torch.empty(0, 64).to(BF16)}, "not empty"),
    ("npu_swiglu", {"input": torch.randn(4, 63)}, "even"),
    ("npu_swiglu", {"dim": 2}, "dim is within"),
    ("npu_swiglu", {"input": torch.randn(64, 4).T}, "contiguous"),
    ("npu_swiglu", {"input": torch.empty(0, 4)}, "not empty"),
    ("npu_swiglu", {"input": torch.ones(4, 4, dtype=torch.int32)}, "dtype"),
    ("npu_interleave_rope", lambda a: a.update({name: a[name][..., :32].contiguous() for name in a}), "is 64"),
    ("npu_interleave_rope", lambda a: a.update({name: a[name].float() for name in a}), "x has dtype"),
    ("npu_interleave_rope", lambda a: a.update(cos=a["cos"].half()), "one dtype"),
    ("npu_interleave_rope", lambda a: a.update(x=a["x"].transpose(1, 2)), "x is contiguous"),
    ("npu_interleave_rope", lambda a: a.update({n: a[n].repeat(1, 4, 1, 1) for n in ("cos", "sin")}), "N of"),
    ("npu_interleave_rope", lambda a: a.update({n: a[n][:1] for n in ("cos", "sin")}), "B of"),
    ("npu_interleave_rope", lambda a: a.update({n: a[n][:, :, :2].contiguous() for n in ("cos", "sin")}), "S of"),
    ("npu_interleave_rope", lambda a: a.update(x=a["x"][0]), "x has 4 dims"),
    ("npu_rotary_mul", {"rotary_mode": "quarter"}, "rotary_mode is one of"),
    ("npu_rotary_mul", {"input": torch.randn(2, 5, 4, 127)}, "even and below 896"),
    ("npu_rotary_mul", {"input": torch.randn(1, 1, 1, 896)}, "even and below 896"),
    ("npu_rotary_mul", {"input": torch.randn(4, 128)}, "3 to 4 dims"),
    ("npu_rotary_mul", lambda a: a.update(r2=a["r2"][:, :2]), "r2 has shape"),
    ("npu_rotary_mul", {"r1": torch.ones(1, 1, 1, 128), "r2": torch.ones(1, 1, 1, 128)}, "r1 broadcasts"),
    ("npu_rotary_mul", {"r1": torch.ones(2, 5, 1, 128), "r2": torch.ones(2, 5, 1, 128), "rotary_mode": "interleave"},
     "r1 broadcasts"),
    ("npu_rotary_mul", {"input": torch.ones(1000, 5, 4, 128)}, "B and N are below"),
    ("npu_rotary_mul", {"input": torch.ones(500, 5, 4, 128), "rotary_mode": "interleave"}, "B and N are below"),
    ("npu_rotary_mul", lambda a: a.update(r1=a["r1"] * 2), r"values of r1 are within \[-1, 1\]"),
    ("npu_rotary_mul", {"rotate": torch.eye(64)}, "rotate has shape"),
    ("npu_scatter_nd_update_", {"updates": torch.randn(3, 16)}, "one dtype"),
    ("npu_scatter_nd_update_", {"input": torch.zeros(8, 16, dtype=torch.uint8)}, "input has dtype"),
    ("npu_scatter_nd_update_", {"indices": torch.tensor([0, 1, 2])}, "at least 2 dims"),
    ("npu_scatter_nd_update_", {"indices": torch.zeros(3, 3, dtype=torch.int64)}, "last dim of indices"),
    ("npu_scatter_nd_update_", {"indices": torch.zeros(3, 1)}, "indices has dtype"),
    ("npu_scatter_nd_update_", {"indices": torch.tensor([[0], [1], [8]])}, "indices are within"),
    ("npu_scatter_nd_update_", {"indices": torch.tensor([[0], [1], [-1]])}, "indices are within"),
    ("npu_scatter_nd_update_", {"indices": torch.tensor([[0], [1]])}, "updates has shape"),
    ("npu_scatter_nd_update_", {"indices": torch.tensor([[0], [1], [0]])}, "write the same values"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_what_is_refused(name: str, change: dict[str, Any] | Change, words: str) -> None:
    given = sample(name)
    if callable(change):
        change(given)
    else:
        given.update(change)
    with pytest.raises(emulator.ConstraintError, match=words):
        getattr(npu, name)(**given)
