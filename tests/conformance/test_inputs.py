"""Inputs are the same bits everywhere: values are pinned, and so are the properties that make them portable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_hal.conformance.inputs import Draw, digest
from glm5_hal.errors import HalError

#: Written down once. A change here changes every result ever recorded: it is never a repair.
COARSE = [-1.28125, -1.78125, -1.5, 0.96875]
NORMAL = [-1.2852783203125, -1.7945556640625, -1.5001220703125, 0.9613037109375]
UNIFORM = [0.476287841796875, 0.854949951171875, 0.93988037109375, 0.30621337890625]
SMALL = [-1, 3, 4, 2, 0, -4, -2, -4]
INTEGERS = [41, 58, 95, -29, 17, -96]
PERMUTATION = [1, 2, 0, 3, 5, 7, 6, 4]
DIGEST = "99bba9238a651f7b4345658438838bdd3182cd24c01d585b0b6757412e36919c"

FLOATS = ("bfloat16", "float16", "float32", "float64")


def everything(draw: Draw) -> dict[str, Tensor]:
    return {
        "normal": draw.normal(3, 5, dtype="bfloat16", scale=0.25),
        "uniform": draw.uniform(7),
        "small": draw.small(4, 2, dtype="float16"),
        "integers": draw.integers(-5, 70000, 6),
        "permutation": draw.permutation(9),
    }


# --- the same bits, pinned -------------------------------------------------------------------------------------------


def test_golden_values() -> None:
    draw = Draw(7, "golden")
    assert draw.normal(4).tolist() == NORMAL
    assert Draw(7, "golden").normal(4, dtype="bfloat16").tolist() == COARSE
    assert draw.uniform(4).tolist() == UNIFORM
    assert draw.small(8).tolist() == SMALL
    assert draw.integers(-100, 100, 6).tolist() == INTEGERS
    assert draw.permutation(8).tolist() == PERMUTATION


def test_golden_digest() -> None:
    assert digest(everything(Draw(7, "golden"))) == DIGEST


# --- distribution ----------------------------------------------------------------------------------------------------


def test_normal_is_bell_shaped_and_symmetric() -> None:
    z = Draw(1, "bell").normal(400, 500, dtype="float64")
    assert abs(z.mean().item()) < 0.01
    assert z.std().item() == pytest.approx(math.sqrt(4 * (64**2 - 1) / 12) / 32, rel=0.01)  # 1.1547
    assert z.abs().max() <= 127 / 32
    assert abs(((z / z.std()) ** 3).mean().item()) < 0.02  # skewness
    assert ((z / z.std()) ** 4).mean().item() == pytest.approx(2.7, abs=0.05)  # 3 for a Gaussian, 1.8 for a flat one


def test_uniform_visits_each_step_evenly() -> None:
    counts = torch.bincount((Draw(1, "flat").uniform(128_000) * 128).long(), minlength=128)
    assert counts.numel() == 128
    assert 850 < counts.min() <= counts.max() < 1150


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.5, 1.5), (0.25, 1.0), (-8.0, 8.0), (0.1, 0.2)])
def test_uniform_stays_in_its_range(low: float, high: float) -> None:
    values = Draw(2, "range").uniform(5000, low=low, high=high)
    assert low <= values.min().item() < low + (high - low) / 64
    assert high - (high - low) / 64 <= values.max().item() < high
    assert len(set(values.tolist())) > 4000  # of 5000 draws from some 128 * 2**8 points
    coarse = Draw(2, "range").uniform(5000, dtype="bfloat16", low=low, high=high)
    assert 65 <= len(set(coarse.tolist())) <= 129


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (0.25, 1.0), (0.5, 1.5)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_is_exact_in_every_dtype(dtype: str, low: float, high: float) -> None:
    values = Draw(5, "grid").uniform(2000, dtype=dtype, low=low, high=high).double()
    step = (high - low) / 2 ** {"bfloat16": 7, "float16": 10}.get(dtype, 15)
    steps = (values - low) / (2.0 ** math.ceil(math.log2(step)))
    assert torch.equal(steps, steps.round())
    assert values.max() < high


def test_small_and_integers_reach_their_bounds_and_no_further() -> None:
    draw = Draw(3, "bounds")
    assert set(draw.small(1000, bound=3).tolist()) == {-3, -2, -1, 0, 1, 2, 3}
    assert set(draw.integers(-2, 3, 1000).tolist()) == {-2, -1, 0, 1, 2}
    wide = draw.integers(0, 1 << 40, 1000)
    assert wide.dtype == torch.int64
    assert wide.max() > 1 << 39


def test_permutation_is_one() -> None:
    draw = Draw(4, "deck")
    first, second = draw.permutation(1000), draw.permutation(1000)
    assert first.dtype == torch.int64
    assert first.sort().values.tolist() == list(range(1000))
    assert not torch.equal(first, second)


# --- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "make",
    [
        lambda d, t: d.small(2000, dtype=t, bound=256),
        lambda d, t: d.small(2000, dtype=t, bound=3),
    ],
)
def test_every_dtype_holds_the_same_numbers(make: Callable[[Draw, str], Tensor], dtype: str) -> None:
    values = make(Draw(5, "exact"), dtype)
    assert values.dtype == getattr(torch, dtype)
    assert torch.equal(values.double(), make(Draw(5, "exact"), "float64"))


@pytest.mark.parametrize("scale", [1.0, 2.0**-6])
def test_normal_uses_the_bits_that_a_dtype_has(scale: float) -> None:
    """Computing with fewer bits than the dtype has must show; so wider dtypes have a finer grid, close by."""
    made = {t: Draw(5, "exact").normal(2000, dtype=t, scale=scale) for t in FLOATS}
    wide = made["float64"]
    assert torch.equal(made["float32"].double(), wide)
    for narrow, lost in (("float16", 2.0**-8), ("bfloat16", 2.0**-5)):
        assert (made[narrow].double() - wide).abs().max() <= lost * scale
        rounded = made["float32"].to(getattr(torch, narrow)).double()
        assert (rounded != wide).double().mean() > 0.5  # the narrower dtype cannot hold the wider grid


def test_products_of_exact_fill_sum_exactly_in_float32() -> None:
    draw = Draw(6, "dot")
    a, b = draw.small(4, 6144, bound=4), draw.small(6144, 3, bound=4)
    assert torch.equal((a @ b).double(), a.double() @ b.double())


def test_small_makes_integers_too() -> None:
    assert Draw(7, "int").small(100, dtype="int8", bound=127).dtype == torch.int8
    assert Draw(7, "int").small(100, dtype="float8_e4m3fn", bound=16).dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda d: d.normal(2, scale=0.3), "CONTRACT"),
        (lambda d: d.normal(2, scale=-1.0), "CONTRACT"),
        (lambda d: d.normal(2, scale=0.0), "CONTRACT"),
        (lambda d: d.normal(2, dtype="float16", scale=2.0**20), "CONTRACT"),
        (lambda d: d.normal(2, dtype="float16", scale=2.0**-24), "CONTRACT"),
        (lambda d: d.normal(2, dtype="int8"), "CONTRACT"),
        (lambda d: d.small(2, dtype="bfloat16", bound=257), "CONTRACT"),
        (lambda d: d.small(2, dtype="int8", bound=128), "CONTRACT"),
        (lambda d: d.integers(3, 3, 1), "CONTRACT"),
        (lambda d: d.uniform(2, low=1.0, high=1.0), "CONTRACT"),
        (lambda d: d.normal(2, dtype="bf16"), "UNKNOWN"),
    ],
)
def test_what_would_not_be_exact_is_refused(make: Callable[[Draw], Tensor], code: str) -> None:
    with pytest.raises(HalError) as refusal:
        make(Draw(0, "refused"))
    assert refusal.value.code == code
    assert refusal.value.fix


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_repeats_and_its_calls_do_not() -> None:
    draw = Draw(8, "calls")
    first, second = draw.normal(64), draw.normal(64)
    assert not torch.equal(first, second)
    again = Draw(8, "calls")
    assert torch.equal(first, again.normal(64))
    assert torch.equal(second, again.normal(64))


def test_streams_do_not_see_each_other() -> None:
    alone = Draw(9, "a").normal(64)
    a, b = Draw(9, "a"), Draw(9, "b")
    b.normal(1000)
    assert torch.equal(a.normal(64), alone)


def test_a_call_does_not_depend_on_how_much_the_ones_before_it_drew() -> None:
    short, long = Draw(10, "size"), Draw(10, "size")
    short.normal(3)
    long.normal(30_000)
    assert torch.equal(short.normal(64), long.normal(64))


def test_no_two_streams_or_calls_repeat_anything() -> None:
    draws = [Draw(seed, name) for seed in range(4) for name in ("a", "b", "ab")]
    numbers = torch.cat([draw.integers(0, 1 << 62, 2000) for draw in draws for _ in range(3)])
    assert len(set(numbers.tolist())) == numbers.numel()


def test_shapes() -> None:
    draw = Draw(11, "shapes")
    assert draw.normal().shape == ()
    assert draw.normal(0, 3).shape == (0, 3)
    assert draw.small(2, 0, dtype="int32").shape == (2, 0)
    assert draw.permutation(0).numel() == 0
    assert draw.normal(3, 1, 5).is_contiguous()


# --- digest ----------------------------------------------------------------------------------------------------------


def test_digest_ignores_layout_and_order() -> None:
    t = Draw(12, "layout").normal(6, 4, dtype="bfloat16")
    wide = torch.zeros(6, 9, dtype=torch.bfloat16)
    wide[:, 2:6] = t
    assert digest({"a": t, "b": 1}) == digest({"b": 1, "a": wide[:, 2:6]})
    assert digest({"a": t}) == digest({"a": t.T.contiguous().T})


def test_digest_tells_everything_else_apart() -> None:
    zeros = torch.zeros(2, 3)
    different: list[dict[str, Any]] = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.reshape(3, 2)},
        {"a": zeros.int()},
        {"a": -zeros},
        {"a": zeros.bfloat16()},
        {"a": torch.zeros(2, 3, dtype=torch.uint8)},
        {"a": torch.zeros(0, 3)},
        {"a": torch.zeros(3, 0)},
        {"a": [zeros]},
        {"a": (zeros, zeros)},
        {"a": {"a": zeros}},
        {"a": None},
        {"a": 0},
        {"a": 0.0},
        {"a": -0.0},
        {"a": False},
        {"a": "0"},
        {},
    ]
    assert len({digest(d) for d in different}) == len(different)


def test_digest_refuses_what_it_cannot_pin() -> None:
    with pytest.raises(HalError, match="not defined"):
        digest({"a": object()})
