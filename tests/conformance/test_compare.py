"""The comparator passes every honest kernel and fails every fault, and its verdict says what was wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5_hal.conformance import rounding
from glm5_hal.conformance.calibrated import calibrated
from glm5_hal.conformance.compare import Judgement, absolute, bit_exact, mistrusted
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.rounding import unit_roundoff
from glm5_hal.conformance.selecting import selection
from glm5_hal.errors import HalError

BF16, U = torch.bfloat16, 2.0**-8
U32 = 2.0**-24
INF, NAN = math.inf, math.nan


def sequential_sum(terms: Tensor) -> Tensor:
    """Over the last dim in float32, one after the other (torch.cumsum accumulates in double on a CPU)."""
    return torch.from_numpy(np.add.accumulate(terms.numpy(), axis=-1, dtype=np.float32)[..., -1].copy())


def failed(verdict: Judgement) -> set[str]:
    return {k for k in verdict.errors if not verdict.errors[k] <= verdict.budget[k]}


# --- fault x criterion -----------------------------------------------------------------------------------------------
# Sparse attention in bfloat16: 24 tokens, 4 heads, 64 latent and 32 rope dims, 128 of 256 keys, a padded tail of -1.

SEEDS = range(20)
T, H, C, R, S, K, PAGE = 24, 4, 64, 32, 256, 128, 32
SCALE = (C + R) ** -0.5


@functools.cache
def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = Draw(seed, "sparse attention")
    q, kv = draw.normal(T, H, C + R, dtype="bfloat16"), draw.normal(S, C + R, dtype="bfloat16")
    indices = torch.stack([draw.permutation(S)[:K] for _ in range(T)])
    return q, kv, indices.where(torch.arange(K) < draw.integers(K // 4, K, T, 1), -1)


def scores_of(q: Tensor, kv: Tensor, indices: Tensor, scale: float, mask: bool = True) -> tuple[Tensor, Tensor]:
    """(scores, values) of the selected keys, in the dtype of q."""
    keys = kv[indices.clamp_min(0)]
    scores = torch.einsum("thd,tkd->thk", q, keys) * scale
    return scores.masked_fill((indices < 0)[:, None] & mask, -INF), keys[..., :C]


def weights_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights, weights.sum(-1, keepdim=True)


def attend(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("thk,tkc->thc", weights, values)


def emulation(q: Tensor, kv: Tensor, indices: Tensor, scale: float = SCALE, mask: bool = True) -> Tensor:
    """The contract: products in float32, P rounded to bfloat16 before it is normalised."""
    scores, values = scores_of(q.float(), kv.float(), indices, scale, mask)
    weights, total = weights_of(scores)
    return (attend(weights.to(BF16).float(), values) / total).to(BF16)


@functools.cache
def expected(seed: int) -> tuple[Tensor, Tensor]:
    q, kv, indices = inputs(seed)
    scores, values = scores_of(q.double(), kv.double(), indices, SCALE)
    weights, total = weights_of(scores)
    return attend(weights, values) / total, emulation(q, kv, indices)


def p_unrounded(seed: int) -> Tensor:
    q, kv, indices = inputs(seed)
    scores, values = scores_of(q.float(), kv.float(), indices, SCALE)
    weights, total = weights_of(scores)
    return (attend(weights, values) / total).to(BF16)


def p_normalised_then_rounded(seed: int) -> Tensor:
    q, kv, indices = inputs(seed)
    scores, values = scores_of(q.float(), kv.float(), indices, SCALE)
    weights, total = weights_of(scores)
    return attend((weights / total).to(BF16).float(), values).to(BF16)


def keys_in_reverse(seed: int) -> Tensor:
    q, kv, indices = inputs(seed)
    return emulation(q, kv, indices.flip(1))


def last_key_dropped(seed: int) -> Tensor:
    q, kv, indices = inputs(seed)
    last = (indices >= 0).sum(1, keepdim=True) - 1
    return emulation(q, kv, indices.scatter(1, last, -1))


def padding_read_as_slot_0(seed: int) -> Tensor:
    return emulation(*inputs(seed), mask=False)


def scale_off(seed: int) -> Tensor:
    return emulation(*inputs(seed), scale=SCALE * 1.02)


def token_zeroed(seed: int) -> Tensor:
    return expected(seed)[1].index_fill(0, torch.tensor(5), 0.0)


def rows_swapped(seed: int) -> Tensor:
    out = expected(seed)[1].clone()
    out[3, 1], out[7, 2] = out[7, 2].clone(), out[3, 1].clone()
    return out


def bf16_accumulator(seed: int) -> Tensor:
    q, kv, indices = inputs(seed)
    scores, values = scores_of(q.float(), kv.float(), indices, SCALE)
    weights, total = weights_of(scores)
    out = torch.zeros(T, H, C, dtype=BF16)
    for k in range(K):
        out = (out.float() + weights.to(BF16).float()[..., k, None] * values[:, None, k]).to(BF16)
    return (out.float() / total).to(BF16)


def stale_page(seed: int) -> Tensor:
    q, kv, indices = inputs(seed)
    return emulation(q, torch.cat([kv[:PAGE], kv[:PAGE], kv[2 * PAGE :]]), indices)


def kv_requantised(seed: int) -> Tensor:
    q, kv, indices = inputs(seed)
    return emulation(q, kv.to(torch.float8_e4m3fn).to(BF16), indices)


def times_1_01(seed: int) -> Tensor:
    return (expected(seed)[1].float() * 1.01).to(BF16)


def plus_0_006(seed: int) -> Tensor:
    return (expected(seed)[1].float() + 0.006).to(BF16)


def judged(kernel: Callable[[int], Tensor], seed: int) -> Judgement:
    y, b = expected(seed)
    return calibrated(kernel(seed), y, b, unit=U, floor=2 * U32 * math.sqrt(K))


@pytest.mark.parametrize("kernel", [p_unrounded, p_normalised_then_rounded, keys_in_reverse])
def test_honest_kernels_pass(kernel: Callable[[int], Tensor]) -> None:
    for seed in SEEDS:
        verdict = judged(kernel, seed)
        assert verdict.ok, (seed, verdict.detail)
        assert max(verdict.errors[k] / verdict.budget[k] for k in ("row", "mean", "slope", "bias", "element")) < 0.8


@pytest.mark.parametrize(
    ("kernel", "criterion"),
    [
        (last_key_dropped, "row"),
        (padding_read_as_slot_0, "row"),
        (scale_off, "slope"),
        (token_zeroed, "row"),
        (rows_swapped, "row"),
        (bf16_accumulator, "row"),
        (stale_page, "row"),
        (kv_requantised, "mean"),
        (times_1_01, "slope"),
        (plus_0_006, "bias"),
    ],
)
def test_every_fault_is_killed(kernel: Callable[[int], Tensor], criterion: str) -> None:
    for seed in SEEDS:
        verdict = judged(kernel, seed)
        assert not verdict.ok, seed
        assert criterion in failed(verdict), (seed, verdict.detail)
        assert max(verdict.errors[k] / verdict.budget[k] for k in ("row", "mean", "slope", "bias", "element")) > 1.5
        assert not verdict.mistrusted


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("keys", [1, 2, 3])
def test_few_keys_and_few_rows_are_no_trap(rows: int, keys: int) -> None:
    # One rounded weight moves a whole row here, and the emulation may be spared it by luck.
    for seed in SEEDS:
        q, kv, indices = (t[:rows] if t.shape[0] == T else t for t in inputs(seed))
        q, indices = q[:, :1], indices[:, :keys]
        scores, values = scores_of(q.double(), kv.double(), indices, SCALE)
        weights, total = weights_of(scores)
        x = attend((weights / total).to(BF16).double(), values).to(BF16)
        verdict = calibrated(x, attend(weights, values) / total, emulation(q, kv, indices), unit=U)
        assert verdict.ok, (seed, verdict.detail)


# --- accumulation order ----------------------------------------------------------------------------------------------


def test_a_strictly_sequential_float32_sum_is_honest() -> None:
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        a, w = torch.randn(2, 6144, generator=generator), torch.randn(64, 6144, generator=generator)
        x, y = sequential_sum(a[:, None] * w), a.double() @ w.double().T
        floor = 2 * U32 * math.sqrt(6144)
        for b in (y.float(), a @ w.T):
            assert calibrated(x, y, b, unit=U32, floor=floor).ok, seed
            assert calibrated(x.to(BF16), y, b.to(BF16), unit=U, floor=floor).ok, seed
        assert not calibrated(x, y, y.float(), unit=U32).ok, "the floor is what lets it pass"


def test_one_element_rows_pass_with_a_floor_of_their_own() -> None:
    # A single inner product may cancel; the rounding of its terms is then large against the result.
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        a, w = torch.randn(50, 600, generator=generator), torch.randn(600, generator=generator)
        y = (a.double() @ w.double())[:, None]
        amplify = a.double().norm(dim=1) * w.double().norm() / y[:, 0].abs()
        floor = 2 * U32 * math.sqrt(600) * amplify
        assert calibrated(sequential_sum(a * w)[:, None], y, (a @ w)[:, None], unit=U32, floor=floor).ok, seed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (1, 576), (8, 128)])
def test_a_norm_rounded_once_or_twice_is_honest(dtype: str, shape: tuple[int, int]) -> None:
    storage, unit, D = getattr(torch, dtype), unit_roundoff(dtype), shape[1]

    def norm(x: Tensor, weight: Tensor, rounds: int, square_mean: Tensor | None = None) -> Tensor:
        mean = x.square().mean(-1, keepdim=True) if square_mean is None else square_mean
        y = x * torch.rsqrt(mean + 1e-5)
        y = (y.to(storage).to(y.dtype) if rounds == 2 else y) * weight
        return y.to(storage) if rounds else y

    for seed in SEEDS:
        draw = Draw(seed, "norm")
        x, weight = draw.normal(*shape, dtype=dtype), draw.uniform(D, dtype=dtype, low=0.5, high=1.5)
        y, b = norm(x.double(), weight.double(), 0), norm(x.float(), weight.float(), 2)
        in_order = sequential_sum(x.float().square())[:, None] / D
        for kernel in (
            norm(x.float(), weight.float(), 1),
            b,
            norm(x.float(), weight.float(), 1, in_order),
        ):
            verdict = calibrated(kernel, y, b, unit=unit, floor=2 * U32 * math.sqrt(D))
            assert verdict.ok, (seed, verdict.detail)


# --- what calibrated looks at ----------------------------------------------------------------------------------------


def rounded(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(y, its rounding to bfloat16)."""
    y = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return y, y.to(BF16)


def test_the_detail_names_criterion_element_and_rows() -> None:
    y, b = rounded(4, 3, 128)
    x = b.clone()
    x[2, 1, 77] = 9.0
    x[3, 0] = 0.0
    verdict = calibrated(x, y, b, unit=U)
    assert {"row", "element"} <= failed(verdict)
    assert "row: " in verdict.detail
    assert "2 of 12 rows" in verdict.detail
    assert f"at [2, 1, 77] got 9.0, expected {y[2, 1, 77].item()!r}" in verdict.detail


def test_one_wrong_element_of_a_long_row_is_seen() -> None:
    y, b = rounded(64, 512)
    at = y[10].abs().sub(2.0).abs().argmin()  # an element of about two sigma, 4 % off: 0.35 % of its row
    x = b.clone()
    x[10, at] *= 1.04
    verdict = calibrated(x, y, b, unit=U)
    assert failed(verdict) == {"element"}
    assert f"at [10, {int(at)}]" in verdict.detail
    assert "1 of 64 rows" in verdict.detail


def test_a_fault_of_the_whole_names_the_worst_element() -> None:
    y, b = rounded(32, 40)
    verdict = calibrated((y * 1.002).to(BF16), y, b, unit=U)
    assert failed(verdict) == {"slope"}
    assert "0 of 32 rows are wrong by themselves; at [" in verdict.detail


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_non_finite_where_the_oracle_is_finite_fails(wrong: float) -> None:
    y, x = rounded(3, 100)
    b = x.clone()
    x[1, 50] = wrong
    verdict = calibrated(x, y, b, unit=U)
    assert "nonfinite" in failed(verdict)
    assert "at [1, 50]" in verdict.detail
    assert all(math.isfinite(e) for e in verdict.errors.values())


@pytest.mark.parametrize(("got", "ok"), [(-INF, True), (INF, False), (NAN, False), (-1e30, False)])
def test_infinities_must_be_the_oracles(got: float, ok: bool) -> None:
    y, x = rounded(3, 100)
    y[0, ::2], y[2] = -INF, -INF
    x = y.to(BF16)
    b = x.clone()
    x[2, 4] = got
    assert calibrated(x, y, b, unit=U).ok is ok


def test_nan_must_be_the_oracles() -> None:
    y, x = rounded(3, 4)
    y[1, 1] = x[1, 1] = NAN
    assert calibrated(x, y, x, unit=U).ok
    x = x.clone()
    x[1, 1] = 0.0
    assert not calibrated(x, y, y.to(BF16), unit=U).ok


def test_overflow_of_the_storage_dtype_is_honest() -> None:
    y = torch.tensor([[1.0, 70000.0, -2.0]], dtype=torch.float64)
    x = y.to(torch.float16)
    assert x[0, 1] == INF
    assert calibrated(x, y, x, unit=2.0**-11).ok
    assert not calibrated(x.nan_to_num(posinf=65504.0), y, x, unit=2.0**-11).ok


def test_empty_rows_are_exact() -> None:
    y, x = rounded(5, 8)
    y[2] = x[2] = 0.0
    assert calibrated(x, y, x, unit=U).ok
    b = x.clone()
    x[2, 3] = 1e-30
    verdict = calibrated(x, y, b, unit=U)
    assert failed(verdict) == {"empty"}
    assert "at [2, 3]" in verdict.detail
    floor = torch.zeros(5, dtype=torch.float64)
    floor[2] = NAN  # 0/0, the relative floor of an empty row
    assert calibrated(b, y, b, unit=U, floor=floor).ok
    assert not calibrated(x, y, b, unit=U, floor=floor).ok


def test_an_output_of_zeros() -> None:
    zeros = torch.zeros(3, 100, dtype=torch.float64)
    assert calibrated(zeros.to(BF16), zeros, zeros.to(BF16), unit=U).ok
    assert not calibrated((zeros + 1e-3).to(BF16), zeros, zeros.to(BF16), unit=U).ok


def test_a_row_that_cancels_excuses_no_other() -> None:
    y, b = rounded(40, 128)
    y[0] *= 1e-4
    b = y.to(BF16)
    b[0] += 1e-3  # an error of the usual size, ten times the row itself
    assert calibrated(b, y, b, unit=U).ok
    x = b.clone()
    x[9] = 0.0
    assert "row" in failed(calibrated(x, y, b, unit=U))
    x = b.clone()
    x[9, 5] += 0.5
    assert "element" in failed(calibrated(x, y, b, unit=U))
    x = (y + 1.2 * U * rounded(40, 128, seed=1)[0]).to(BF16)
    x[0] = b[0]
    assert failed(calibrated(x, y, b, unit=U)) >= {"mean"}


def test_a_large_row_excuses_no_small_one() -> None:
    y = rounded(40, 32)[0]
    y[0] *= 1e4
    x = y.to(BF16)
    assert calibrated(x, y, x, unit=U).ok
    b = x.clone()
    x[9] = 0.0
    assert failed(calibrated(x, y, b, unit=U)) >= {"row"}


def test_one_rounding_shared_by_a_row_is_honest() -> None:
    y = rounded(1, 2048)[0]
    assert calibrated((y * (1 + 0.9 * U)).to(BF16), y, y.float(), unit=U).ok
    assert not calibrated((y * 1.01).to(BF16), y, y.float(), unit=U).ok


def test_the_floor_covers_whatever_has_its_size() -> None:
    y = rounded(64, 512)[0] + 0.5
    floor = 0.01
    rms = y.square().mean().sqrt()
    for x in (y * (1 + 0.9 * floor), y + 0.9 * floor * rms * rounded(64, 512, seed=1)[0], y + 0.9 * floor * rms):
        verdict = calibrated(x.float(), y, y.float(), unit=U32, floor=floor)
        assert verdict.ok, verdict.detail
    assert not calibrated((y * (1 + 1.5 * floor)).float(), y, y.float(), unit=U32, floor=floor).ok
    x = y.float()
    x[30, 41] += 0.2
    assert failed(calibrated(x, y, y.float(), unit=U32, floor=floor)) == {"element"}


def test_an_element_two_spacings_off_is_seen() -> None:
    y = torch.ones(256, 64, dtype=torch.float64)
    x = y.to(BF16)
    x[:, ::2] = -1.0
    y[:, ::2] = -1.0
    b = x.clone()
    x[30, 41] = 1 + 2.0**-6
    assert failed(calibrated(x, y, b, unit=U)) == {"element"}


def test_an_element_beyond_the_emulations_noise_is_seen() -> None:
    y = rounded(64, 128)[0]
    noise = U * rounded(64, 128, seed=1)[0]
    b = (y + noise).to(BF16)
    x = (y + noise.flip(0)).to(BF16)
    assert calibrated(x, y, b, unit=U).ok
    x[30, 41] += 0.2
    assert "element" in failed(calibrated(x, y, b, unit=U))


def test_the_slopes_budget_is_that_of_chance() -> None:
    y = torch.ones(64, 1, dtype=torch.float64)
    verdict = calibrated(y.to(BF16), y, y.float(), unit=U)
    assert verdict.budget["slope"] == verdict.budget["bias"] == pytest.approx(4 * U / 8)


def test_each_row_has_its_own_floor() -> None:
    y, b = rounded(3, 20)
    x = b.clone()
    x[0] *= 1.1
    floor = torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64)
    assert "row" not in failed(calibrated(x, y, b, unit=U, floor=floor))
    assert "row" in failed(calibrated(x, y, b, unit=U, floor=floor.flip(0)))


def test_an_exact_emulation_leaves_room_for_rounding() -> None:
    y = torch.full((1, 1), 1.0, dtype=torch.float64) + 2.0**-9
    x = torch.tensor([[1.0 + 2.0**-7]], dtype=BF16)  # the neighbour on the other side, half a spacing away
    assert calibrated(x, y, y.float(), unit=U).ok
    assert not calibrated(x * 1.05, y, y.float(), unit=U).ok


def test_values_that_are_all_but_constant_are_no_trap() -> None:
    for spread in (0.0, 1e-6, 1e-3):
        y = 1.002 + spread * rounded(64, 100)[0]
        verdict = calibrated(y.to(BF16), y, y.float(), unit=U)
        assert verdict.ok, verdict.detail


def test_subnormals_may_be_flushed_where_the_exponent_is_wide() -> None:
    y = torch.full((2, 4), 1e-39, dtype=torch.float64)
    y[1] = 1.0
    x = y.float()
    x[0] = 0.0
    assert calibrated(x, y, y.float(), unit=U32).ok
    small = torch.full((1, 4), 1e-20, dtype=torch.float64)
    assert not calibrated(torch.zeros(1, 4), small, small.float(), unit=U32).ok
    half = torch.full((1, 4), 2.0**-20, dtype=torch.float64)
    assert "row" in failed(calibrated(torch.zeros(1, 4, dtype=torch.float16), half, half.half(), unit=2.0**-11))


def test_a_result_in_another_dtype_is_not_measured_with_that_dtypes_budget() -> None:
    y, x = rounded(4, 8)
    assert "dtype" in calibrated(x, y, y.float(), unit=U32).detail
    assert "dtype" in calibrated(y.float(), y, x, unit=U).detail
    y, x = rounded(64, 512)
    assert calibrated(x, y, y.float(), unit=U).ok, "the emulation may be a wider carrier"


def test_a_result_of_another_shape_fails() -> None:
    y, x = rounded(4, 8)
    assert calibrated(x.T, y, x, unit=U).detail == "shape: got [8, 4], expected [4, 8]"
    with pytest.raises(HalError):
        calibrated(x, y, x.T, unit=U)


def test_a_broken_emulation_or_floor_is_mistrusted() -> None:
    y, x = rounded(4, 8)
    broken = x.clone()
    broken[0, 0] = NAN
    useless = (y + 100).to(BF16)
    for verdict in (
        calibrated(x, y, broken, unit=U),
        calibrated(x, y, x, unit=U, floor=NAN),
        calibrated(x, y, useless, unit=U),
        calibrated(x, y, x, unit=U, floor=1.0),
    ):
        assert verdict.mistrusted
        assert not verdict.ok


@pytest.mark.parametrize(
    ("shape", "row_dims"), [((), 1), ((5,), 1), ((5,), 2), ((4, 3, 6), 2), ((4, 6), 0), ((0, 4), 1)]
)
def test_any_shape_has_rows(shape: tuple[int, ...], row_dims: int) -> None:
    y, x = rounded(*shape)
    assert calibrated(x, y, x, unit=U, row_dims=row_dims).ok
    if y.numel():
        verdict = calibrated(-x, y, x, unit=U, row_dims=row_dims)
        assert not verdict.ok
        rows = math.prod(shape[: max(len(shape) - row_dims, 0)])
        assert f"{rows} of {rows} rows" in verdict.detail


def test_strides_do_not_matter() -> None:
    y, x = rounded(64, 70)
    b = x.clone()
    x[60, 7] = 9.0
    straight, strided = calibrated(x, y, b, unit=U), calibrated(x.T.contiguous().T, y.T.contiguous().T, b, unit=U)
    assert strided.errors == pytest.approx(straight.errors, rel=1e-9)
    assert "at [60, 7]" in strided.detail


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    y, b = rounded(50, 80)
    x = b.clone()
    x[40, 3] = 7.0
    whole = calibrated(x, y, b, unit=U)
    assert not whole.ok
    monkeypatch.setattr(rounding, "BLOCK", 3 * 80)
    assert calibrated(x, y, b, unit=U) == whole


# --- absolute --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [1, 2, 17, 512])
def test_lse_in_scalar_loops_is_honest(keys: int) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        q, k = torch.randn(6, 96, generator=generator), torch.randn(keys, 96, generator=generator)
        y = torch.logsumexp(q.double() @ k.double().T / 8, -1)
        b = torch.logsumexp(q @ k.T / 8, -1)
        scores = sequential_sum(q[:, None] * k) / 8
        m = scores.amax(1)
        x = m + sequential_sum((scores - m[:, None]).exp()).log()
        floor = 2 * U32 * math.sqrt(96) * q.norm(dim=1).double() * k.norm(dim=1).max() / 8
        verdict = absolute(x, y, b, unit=U32, floor=floor)
        assert verdict.ok, (seed, verdict.detail)
        for fault in (x / math.log(2), x + 1e-4, torch.logsumexp(scores[:, 1:], 1)):
            assert not absolute(fault, y, b, unit=U32, floor=floor).ok


def test_an_lse_of_zero_has_a_budget() -> None:
    y = torch.zeros(3, dtype=torch.float64)
    assert absolute(torch.tensor([0.0, 1e-7, -1e-7]), y, y.float(), unit=U32).ok
    assert not absolute(torch.tensor([0.0, 1e-7, -1e-5]), y, y.float(), unit=U32).ok
    assert absolute(torch.tensor([0.0, 1e-7, -1e-5]), y, torch.tensor([3e-6, 0.0, 0.0]), unit=U32).ok


@pytest.mark.parametrize("got", [INF, NAN, 0.0, -(2.0**100)])
def test_lse_of_an_empty_row_is_minus_infinity(got: float) -> None:
    y = torch.tensor([[-INF, 1.0], [2.0, -INF]], dtype=torch.float64)
    x = y.float()
    assert absolute(x, y, y.float(), unit=U32).ok
    x[1, 1] = got
    verdict = absolute(x, y, y.float(), unit=U32)
    assert failed(verdict) == {"nonfinite"}
    assert f"1 of 4 are wrong; at [1, 1] got {got!r}, expected -inf" in verdict.detail


def test_lse_finite_nowhere() -> None:
    y = torch.full((3,), -INF, dtype=torch.float64)
    assert absolute(y.float(), y, y.float(), unit=U32).ok
    assert not absolute(torch.zeros(3), y, y.float(), unit=U32).ok


def test_a_broken_lse_emulation_is_mistrusted() -> None:
    y = torch.ones(3, dtype=torch.float64)
    assert absolute(y.float(), y, torch.full((3,), -INF), unit=U32).mistrusted


# --- bit_exact -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool])
def test_the_same_bits(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    assert bit_exact(x, x.clone()).ok
    assert bit_exact(x.T.contiguous().T, x).ok
    y = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    verdict = bit_exact(x, y)
    assert not verdict.ok
    assert "1 of 6 elements differ, in 1 rows; at [1, 2]" in verdict.detail


def test_the_sign_of_zero_is_a_bit() -> None:
    verdict = bit_exact(torch.tensor([1.0, -0.0]), torch.tensor([1.0, 0.0]))
    assert not verdict.ok
    assert "at [1] got -0.0, expected 0.0 (the sign of zero)" in verdict.detail


def test_nan_equals_itself_and_its_payload_counts() -> None:
    nan, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert bit_exact(nan, nan.clone()).ok
    assert not bit_exact(nan, other).ok


def test_dtype_and_shape_are_bits_too() -> None:
    assert "torch.int32 [2], expected torch.int64 [2]" in bit_exact(torch.zeros(2).int(), torch.zeros(2).long()).detail
    assert not bit_exact(torch.zeros(2), torch.zeros(2, 1)).ok
    assert bit_exact(torch.zeros(0, 3), torch.zeros(0, 3)).ok
    assert bit_exact(torch.tensor(1.5), torch.tensor(1.5)).ok


# --- selection -------------------------------------------------------------------------------------------------------


def pick(
    indices: list[int], scores: list[float], tau: float = 0.0, canonical: bool = False, sorted_: bool = False
) -> Judgement:
    return selection(
        torch.tensor([indices], dtype=torch.int32),
        torch.tensor([scores], dtype=torch.float64),
        tau,
        canonical=canonical,
        sorted_=sorted_,
    )


@pytest.mark.parametrize(
    ("indices", "wrong"),
    [
        ([3, 1], None),
        ([1, 3], None),
        ([1, 2], "chosen below the k-th"),
        ([3, 3], "duplicate"),
        ([3, 4], "invalid index"),
        ([3, -2], "invalid index"),
        ([3, -1], "count"),
        ([-1, 3], "-1 before the tail"),
        ([-1, -1], "count"),
    ],
)
def test_what_is_chosen(indices: list[int], wrong: str | None) -> None:
    verdict = pick(indices, [0.0, 5.0, 4.0, 6.0])
    assert verdict.ok is (wrong is None)
    assert wrong is None or wrong in failed(verdict)
    assert wrong is None or "1 of 1 rows; first row 0" in verdict.detail


def test_within_tau_of_the_kth_the_choice_is_free() -> None:
    scores = [0.0, 5.0, 4.9, 6.0]
    assert not pick([3, 2], scores, tau=0.05).ok
    assert failed(pick([3, 2], scores, tau=0.05)) == {"chosen below the k-th"}
    assert failed(pick([1, 2], scores, tau=0.2)) == {"unchosen above the k-th"}
    assert pick([1, 2], scores, tau=1.2).ok
    assert pick([3, 2], scores, tau=0.1001).ok


def test_ties_across_the_kth_place() -> None:
    scores = [1.0, 2.0, 2.0, 3.0, 2.0]
    for pair in ([3, 1], [3, 2], [3, 4]):
        assert pick(pair, scores).ok
        assert pick(pair, scores, canonical=True).ok is (pair == [3, 1])
    assert pick([1, 3, 2], scores, canonical=True).ok
    assert failed(pick([1, 3, 4], scores, canonical=True)) == {"not the canonical set"}


def test_zeros_of_either_sign_tie() -> None:
    scores = [-0.0, 0.0, -0.0, -1.0]
    assert pick([0, 1], scores, canonical=True).ok
    assert not pick([1, 2], scores, canonical=True).ok
    assert pick([1, 2], scores).ok


def test_negative_scores_lose_to_nothing_that_is_not_eligible() -> None:
    scores = [-3.0, -1.0, -2.0, -INF, -INF]
    assert pick([1, 2], scores, canonical=True).ok
    verdict = pick([3, 1], scores)  # a kernel that fills what it must not read with 0
    assert "not eligible" in failed(verdict)


def test_nan_and_minus_infinity_are_never_chosen() -> None:
    scores = [NAN, 1.0, -INF, 2.0, NAN]
    for canonical in (False, True):
        assert pick([3, 1, -1], scores, canonical=canonical).ok
        for wrong in ([3, 1, 0], [3, 1, 2], [0, 3, 1], [3, 0, -1], [3, -1, -1]):
            assert not pick(wrong, scores, canonical=canonical).ok
    assert pick([-1, -1], [NAN, -INF]).ok


def test_plus_infinity_is_a_score() -> None:
    assert pick([1, 2], [1.0, INF, INF, 5.0], tau=0.5, canonical=True).ok
    assert not pick([1, 3], [1.0, INF, INF, 5.0], tau=0.5).ok


def test_short_rows_take_everything() -> None:
    for canonical in (False, True):
        assert pick([1, 0, -1, -1], [1.0, 2.0], canonical=canonical).ok
        assert not pick([1, -1, -1, -1], [1.0, 2.0], canonical=canonical).ok
        assert pick([-1, -1], [], canonical=canonical).ok
        assert pick([], [1.0, 2.0], canonical=canonical).ok


def test_ascending_order_where_it_is_claimed() -> None:
    scores = [5.0, 1.0, 4.0, NAN]
    assert pick([0, 2], scores, sorted_=True).ok
    assert failed(pick([2, 0], scores, sorted_=True)) == {"not ascending"}
    assert pick([0, 1, 2, -1], scores, sorted_=True).ok


def test_without_padding_there_must_be_enough() -> None:
    indices, scores = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    assert selection(indices, scores, 0.0, canonical=True, sorted_=True, padded=False).ok
    scores[0, 1:] = -INF
    assert selection(indices, scores, 0.0, canonical=True, sorted_=True, padded=False).mistrusted


def test_the_dtype_and_shape_of_indices() -> None:
    scores = torch.zeros(2, 3, dtype=torch.float64)
    for indices in (torch.zeros(2, 1).long(), torch.zeros(2).int(), torch.zeros(3, 1).int()):
        assert not selection(indices, scores, 0.0, canonical=False, sorted_=False).ok
    assert selection(torch.zeros(0, 1).int(), scores[:0], 0.0, canonical=True, sorted_=True).ok


def test_tau_is_per_row_and_must_make_sense() -> None:
    indices, scores = torch.tensor([[1], [1]], dtype=torch.int32), torch.tensor([[1.0, 0.9]] * 2, dtype=torch.float64)
    verdict = selection(indices, scores, torch.tensor([0.2, 0.0]), canonical=False, sorted_=False)
    assert "1 of 2 rows; first row 1" in verdict.detail
    for tau in (-1.0, NAN):
        assert selection(indices, scores, tau, canonical=False, sorted_=False).mistrusted


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, INF, -INF, NAN]), max_size=9),
    st.integers(0, 6),
    st.booleans(),
    st.data(),
)
def test_selection_agrees_with_a_sort(scores: list[float], k: int, canonical: bool, data: st.DataObject) -> None:
    eligible = [i for i, s in enumerate(scores) if s > -INF]
    best = sorted(eligible, key=lambda i: (-scores[i], i))[:k]
    guess = data.draw(st.one_of(st.just(best), st.permutations(eligible).map(lambda order: order[:k])))
    same = set(guess) == set(best) if canonical else sorted(scores[i] for i in guess) == sorted(scores[i] for i in best)
    assert pick(guess + [-1] * (k - len(guess)), scores, canonical=canonical).ok is same


def test_a_large_selection_is_judged_in_blocks() -> None:
    scores = torch.randn(70, 65536, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    indices = scores.sort(dim=1, descending=True, stable=True).indices[:, :2048].sort(1).values.int()
    assert selection(indices, scores, 0.0, canonical=True, sorted_=True).ok
    indices[66, 7] = indices[66, 6]
    verdict = selection(indices, scores, 0.0, canonical=True, sorted_=True)
    assert "1 of 70 rows; first row 66" in verdict.detail


# --- mistrust --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([torch.randn(8)], ""),
        ([torch.zeros(8)], "zero everywhere"),
        ([torch.full((8,), 3.0)], "constant"),
        ([torch.full((8,), -INF)], "nowhere finite"),
        ([torch.tensor([1.0, INF, NAN, 1.0, 1.0])], "constant"),
        ([torch.zeros(4)], ""),
        ([torch.zeros(8, dtype=torch.int32)], ""),
        ([torch.zeros(8), torch.full((8,), -INF)], "zero everywhere, nowhere finite"),
        ([torch.zeros(8), torch.arange(8.0)], ""),
        ([], ""),
    ],
)
def test_outputs_that_prove_nothing(outputs: list[Tensor], reason: str) -> None:
    found = mistrusted(*outputs)
    assert found.endswith(reason)
    assert bool(found) is bool(reason)


def test_unit_roundoff() -> None:
    for name in ("bfloat16", "float16", "float32", "float64"):
        assert unit_roundoff(name) == torch.finfo(getattr(torch, name)).eps / 2
    with pytest.raises(HalError, match="int8"):
        unit_roundoff("int8")
