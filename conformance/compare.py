"""How an output is judged: pure functions of CPU tensors.

Letters: x the kernel's output, y the float64 oracle, b an honest emulation of the contract's roundings, u the unit
roundoff of the storage dtype. A *row* is the vector that one unit of work produces (one token and head, say); tensors
named ``_R`` hold one number per row. A budget is made of the emulation's own error, the rounding of the result, which
nobody can avoid, and a floor for the order of accumulation. Nothing in it is per vendor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from glm5_hal.errors import HalError

#: Unit roundoff: half the distance from 1 to the next number above it.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}

#: Tensors are measured in blocks of rows of about this many elements, which bounds the memory of float64 copies.
BLOCK = 1 << 22

#: A row this long samples the emulation's noise well enough to judge single elements by it. In a shorter row one wrong
#: element already is a large part of the row's error.
LONG = 64

#: Keeps 0/0 at 0.
TINY = 1e-300


@dataclass(frozen=True)
class Judgement:
    """A verdict on one output, with the numbers behind it: ok means errors[c] <= budget[c] for every criterion c.

    ``mistrusted``: the emulation or the inputs prove nothing, so the kernel is not to blame; ok is then False too.
    """

    ok: bool
    errors: dict[str, float] = field(default_factory=dict)
    budget: dict[str, float] = field(default_factory=dict)
    detail: str = ""
    mistrusted: bool = False


def unit_roundoff(dtype: str) -> float:
    """u of a storage dtype, by torch name."""
    if dtype not in UNIT:
        raise HalError("UNKNOWN", f"no unit roundoff for dtype {dtype!r}", value=dtype, fix=f"known: {', '.join(UNIT)}")
    return UNIT[dtype]


def calibrated(
    x: Tensor, y: Tensor, b: Tensor, *, unit: float, floor: float | Tensor = 0.0, row_dims: int = 1
) -> Judgement:
    """Row by row against float64, with the budget that the honest emulation sets.

    With e = ‖x−y‖/‖y‖ of a row and e_b likewise of b rounded to storage, never less than rounding the row's largest
    element alone may cost (or a row of one element could have a budget of nothing), x passes iff

    - ``nonfinite``: inf and NaN are where y, stored, has them, and nowhere else;
    - ``empty``: rows of zeros are exactly zero (within 4 times b's error, where even b is not);
    - ``row``: e <= 4 max e_b + floor in every row, the row's own floor if it is a tensor. max e_b is not taken further
      than b's largest error in absolute terms, lest one row that cancels to almost nothing excuse all others;
    - ``mean``: mean e <= 2 mean e_b + u/√R + floor, over the rows of which b makes something (e_b + floor < 1);
    - ``slope``: |⟨x,y⟩/⟨y,y⟩ − 1|, and ``bias``: |mean(x−y)|/σ(y), are within 1e-3, or 4 u/√n or 2 u/√R where that is
      more, + twice what b shows + floor. n and R are effective numbers of elements and rows: (Σs²)²/Σs⁴;
    - ``element`` (rows of 64 and more): |x−y| <= 3 half-spacings at y + 4 times b's largest error beyond its own
      rounding, in units of the row's rms (2 u/√R at least) + 4 floor max(rms, |y|).

    u/√R is one rounding that a whole row shares, as of a dominant softmax weight; b may be spared it by luck.

    Measured, as error/budget over at least 200 draws each: sparse attention in three dtypes with P rounded before or
    after its normalisation or not at all, norms rounded once or twice, sequential float32 sums reach at most 0.85 row
    (a lone row of 8 elements; 0.67 from 64 on), 0.75 mean, 0.70 element, 0.54 slope, 0.37 bias. Ten faults injected
    into the attention in bfloat16 all exceed 2: a bfloat16 accumulator least of all, 1 % of scale by 7, the rest by 8
    and more. What bfloat16 hides: an accumulator of that type rounded about ten times only, or one element of 512 that
    is wrong by 2 %. A row of a few elements may cancel: its floor must know (`Calibrated.amplify`).
    """
    problem = _unlike(x, y, b, unit)
    if problem or y.numel() == 0:
        return Judgement(not problem, detail=problem)
    shape = y.shape[: max(y.dim() - row_dims, 0)]
    R = math.prod(shape)
    n = y.numel() // R
    X, Y, B = x.reshape(R, n), y.double().reshape(R, n), b.reshape(R, n)
    parts = [_measure(X[i], Y[i], B[i], unit) for i in blocks(R, n)]
    rows = _Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))
    live_R = rows.size > 0
    floor_R = torch.where(live_R, torch.as_tensor(floor, dtype=torch.float64).expand(shape).reshape(-1), 0.0)
    if not (rows.honest.isfinite() & floor_R.isfinite()).all():
        return mistrust("the emulation or the floor is not finite where the oracle is")

    size_R = torch.where(live_R, rows.size, 1.0)
    error_R, honest_R, least_R = (torch.where(live_R, v / size_R, 0.0) for v in (rows.error, rows.honest, rows.least))
    tells_R = live_R & (honest_R + floor_R < 1)
    if live_R.any() and not tells_R.any():
        return mistrust("the emulation and the floor are as far from the oracle as zeros would be")
    budget_R = 4 * torch.maximum((rows.honest.max() / size_R).clamp_max(honest_R.max()), least_R) + floor_R
    wrong_R = {
        "nonfinite": rows.strange > 0,
        "empty": ~live_R & (rows.error > 4 * rows.honest),
        "row": live_R & ~(error_R <= budget_R),
    }
    worst = int((error_R / budget_R.clamp_min(TINY)).argmax())
    errors = {k: float(wrong_R[k].sum()) for k in ("nonfinite", "empty")} | {"row": error_R[worst].item()}
    budget = {"nonfinite": 0.0, "empty": 0.0, "row": budget_R[worst].item()}
    once = unit * _concentration(rows.size)
    if live_R.any():
        errors["mean"] = error_R[tells_R].mean().item()
        budget["mean"] = (2 * torch.maximum(honest_R, least_R) + floor_R)[tells_R].mean().item() + once
        (errors["slope"], budget["slope"]), (errors["bias"], budget["bias"]) = _slope_and_bias(rows, floor_R, unit)
    slack_R = _slack(rows, live_R, 2 * once)
    if n >= LONG:
        over_R = torch.cat([_over(X[i], Y[i], slack_R[i], floor_R[i], unit).amax(1) for i in blocks(R, n)])
        errors["element"], budget["element"], wrong_R["element"] = over_R.max().item(), 1.0, over_R > 1
    failed = first_failed(errors, budget)
    if not failed:
        return Judgement(True, errors, budget)
    bad_R = torch.stack([*wrong_R.values()]).any(0)
    first = int(bad_R.int().argmax()) if bad_R.any() else worst
    over = _over(X[[first]], Y[[first]], slack_R[[first]], floor_R[[first]], unit)[0]
    at = first * n + int((over > 1).int().argmax() if (over > 1).any() else over.argmax())
    detail = f"{failed}; {int(bad_R.sum())} of {R} rows are wrong by themselves; {_element(x, y, at)}"
    return Judgement(False, errors, budget, detail)


def absolute(x: Tensor, y: Tensor, b: Tensor, *, unit: float, floor: float | Tensor = 0.0) -> Judgement:
    """Element by element, for log-sum-exp: |x−y| <= 4 max|b−y| + floor + 4 u max(|y|, 1), infinities where y has them.

    A relative error would mean nothing here, because the logarithm passes through zero.
    """
    problem = _unlike(x, y, b, unit)
    if problem or y.numel() == 0:
        return Judgement(not problem, detail=problem)
    X, Y = x.reshape(-1).double(), y.reshape(-1).double()
    strange, finite = _strange(X, Y), Y.isfinite()
    honest = (b.reshape(-1).double() - Y).abs()[finite]
    allowed = torch.as_tensor(floor, dtype=torch.float64).expand(y.shape).reshape(-1) + 4 * unit * Y.abs().clamp_min(1)
    if not (honest.isfinite().all() and allowed[finite].isfinite().all()):
        return mistrust("the emulation or the floor is not finite where the oracle is")
    allowed = allowed + 4 * (honest.max() if honest.numel() else 0.0)
    error = torch.where(finite & ~strange, (X - Y).abs(), 0.0)
    worst = int(torch.where(finite, error / allowed.clamp_min(TINY), -1.0).argmax())
    errors = {"nonfinite": float(strange.sum()), "absolute": error[worst].item()}
    budget = {"nonfinite": 0.0, "absolute": allowed[worst].item() if finite.any() else 0.0}
    failed = first_failed(errors, budget)
    if not failed:
        return Judgement(True, errors, budget)
    wrong = strange | (finite & (error > allowed))
    detail = f"{failed}; {int(wrong.sum())} of {y.numel()} are wrong; {_element(x, y, int(wrong.int().argmax()))}"
    return Judgement(False, errors, budget, detail)


def bit_exact(x: Tensor, y: Tensor) -> Judgement:
    """The same dtype, shape and bits: NaN payloads and the sign of zero count."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return Judgement(False, detail=f"got {kind(x)}, expected {kind(y)}")
    if y.numel() == 0:
        return Judgement(True)
    X, Y = (t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (x, y))
    wrong = (X != Y).any(1)
    errors, budget = {"different": float(wrong.sum())}, {"different": 0.0}
    if not wrong.any():
        return Judgement(True, errors, budget)
    at = int(wrong.int().argmax())
    sign = " (the sign of zero)" if x.reshape(-1)[at] == y.reshape(-1)[at] else ""
    rows = int(wrong.reshape(-1, y.shape[-1] if y.dim() else 1).any(1).sum())
    detail = f"bits: {int(wrong.sum())} of {y.numel()} elements differ, in {rows} rows; {_element(x, y, at)}{sign}"
    return Judgement(False, errors, budget, detail)


def mistrusted(*expected: Tensor) -> str:
    """Why the oracle's floating outputs prove nothing about a kernel, or "": all of them zero, constant or non-finite.

    Outputs of up to four elements, and integers, are not suspected. Pass one output for a verdict on it alone.
    """
    suspects = [y for y in expected if y.is_floating_point() and y.numel() > 4]
    reasons = []
    for y in suspects:
        values = y[y.isfinite()]
        if values.numel() == 0:
            reasons.append("nowhere finite")
        elif (values == values[0]).all():
            reasons.append("zero everywhere" if values[0] == 0 else "constant")
    if not suspects or len(reasons) < len(suspects):
        return ""
    return f"the inputs prove nothing: the oracle's output is {', '.join(dict.fromkeys(reasons))}"


class _Rows(NamedTuple):
    """What each row contributes, in float64; non-finite elements count as zero."""

    size: Tensor  # ‖y‖
    error: Tensor  # ‖x−y‖
    honest: Tensor  # ‖b−y‖
    least: Tensor  # what rounding the largest element may cost
    excess: Tensor  # the most that an element of b is off beyond its own rounding
    along: Tensor  # ⟨x−y, y⟩
    along_b: Tensor
    shift: Tensor  # Σ(x−y)
    shift_b: Tensor
    total: Tensor  # Σy
    fourth: Tensor  # Σy⁴
    finite: Tensor  # how many elements of y are
    strange: Tensor  # how many elements of x are not, or not the same way, against y


def _measure(x: Tensor, y: Tensor, b: Tensor, unit: float) -> _Rows:
    d, y, finite, strange = _difference(x, y, unit)
    d_b = torch.where(finite, _stored(b, unit) - y, 0.0)
    half = _half_spacing(y, unit)
    return _Rows(
        size=y.norm(dim=1),
        error=d.norm(dim=1),
        honest=d_b.norm(dim=1),
        least=half.amax(1),
        excess=(d_b.abs() - half).amax(1).clamp_min(0),
        along=(d * y).sum(1),
        along_b=(d_b * y).sum(1),
        shift=d.sum(1),
        shift_b=d_b.sum(1),
        total=y.sum(1),
        fourth=y.pow(4).sum(1),
        finite=finite.sum(1).double(),
        strange=strange.sum(1),
    )


def _slope_and_bias(rows: _Rows, floor_R: Tensor, unit: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """(error, budget) of both."""
    energy, count = rows.size.square().sum().item(), rows.finite.sum().item()
    noise = max(unit, math.sqrt(rows.honest.square().sum().item() / energy))
    chance = max(4 * noise * math.sqrt(rows.fourth.sum().item()) / energy, 2 * unit * _concentration(rows.size))
    slope, slope_b = (abs(v.sum().item()) / energy for v in (rows.along, rows.along_b))
    slope_floor = (floor_R * rows.size.square()).sum().item() / energy
    rms, mean = math.sqrt(energy / count), rows.total.sum().item() / count
    sigma = math.sqrt(max(rms**2 - mean**2, 0.0)) or rms
    bias, bias_b = (abs(v.sum().item()) / count / sigma for v in (rows.shift, rows.shift_b))
    bias_floor = (floor_R * rows.size * rows.finite.sqrt()).sum().item() / count / sigma
    return (
        (slope, max(1e-3, chance) + 2 * slope_b + slope_floor),
        (bias, max(1e-3, chance * rms / sigma) + 2 * bias_b + bias_floor),
    )


def _slack(rows: _Rows, live_R: Tensor, share: float) -> Tensor:
    """How far noise may take an element of each row beyond its rounding; at least `share` of the row's rms."""
    rms_R = rows.size / rows.finite.clamp_min(1).sqrt()
    most = torch.where(live_R, rows.excess / torch.where(live_R, rms_R, 1.0), 0.0).max().clamp_min(share)
    noise_R = torch.minimum(most * rms_R, torch.maximum(rows.excess.max(), share * rms_R))
    return 4 * torch.where(live_R, noise_R, rows.honest)


def _over(x: Tensor, y: Tensor, slack_R: Tensor, floor_R: Tensor, unit: float) -> Tensor:
    """Each element's error over its budget."""
    d, y, finite, strange = _difference(x, y, unit)
    rms_R = y.norm(dim=1) / finite.sum(1).clamp_min(1).sqrt()
    floor = 4 * floor_R[:, None] * torch.maximum(y.abs(), rms_R[:, None])
    allowed = 3 * _half_spacing(y, unit) + slack_R[:, None] + floor
    over = d.abs() / allowed
    return torch.where(strange, torch.finfo(torch.float64).max, over)


def _difference(x: Tensor, y: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x−y and y with zeros for what is not finite, where y is finite, and where x's inf or NaN is not y's."""
    stored, x = _stored(y, unit), x.double()  # an honest kernel overflows where y's storage does
    finite, strange = stored.isfinite(), _strange(x, stored)
    y = torch.where(finite, y, 0.0)
    return torch.where(finite & ~strange, x - y, 0.0), y, finite, strange


def _strange(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y.isfinite(), ~x.isfinite(), (x != y) & ~(x.isnan() & y.isnan()))


def _storage(unit: float) -> torch.dtype:
    return next((getattr(torch, name) for name, u in UNIT.items() if u == unit), torch.float64)


def _stored(t: Tensor, unit: float) -> Tensor:
    return t.to(_storage(unit)).double()


def _half_spacing(y: Tensor, unit: float) -> Tensor:
    """The most that rounding to nearest moves y."""
    mantissa, _ = torch.frexp(y)
    half = unit * torch.where(y == 0, 0.0, y / (2 * mantissa))
    # float16's subnormals, down to 2**-24, are kept by all hardware; those of the wide exponents it may flush to zero.
    return half.clamp_min(min(torch.finfo(_storage(unit)).smallest_normal, 2.0**-24))


def _concentration(size_R: Tensor) -> float:
    """1/√R, with R the effective number of rows: equal rows count whole, small ones hardly."""
    squares = size_R.square()
    return (squares.square().sum().sqrt() / squares.sum().clamp_min(TINY)).item()


def blocks(R: int, n: int) -> Iterator[slice]:
    step = max(BLOCK // max(n, 1), 1)
    return (slice(i, i + step) for i in range(0, R, step))


def first_failed(errors: dict[str, float], budget: dict[str, float]) -> str:
    return ", ".join(f"{k}: {errors[k]:.3g} > {budget[k]:.3g}" for k in errors if not errors[k] <= budget[k])


def mistrust(why: str) -> Judgement:
    return Judgement(False, detail=why, mistrusted=True)


def _unlike(x: Tensor, y: Tensor, b: Tensor, unit: float) -> str:
    if b.shape != y.shape:
        raise HalError("CONTRACT", f"emulation {kind(b)}, oracle {kind(y)}", fix="both are runs of one reference")
    if x.shape != y.shape:
        return f"shape: got {list(x.shape)}, expected {list(y.shape)}"
    # Else a coarser result would be measured with a coarser budget. b may be a wider carrier of storage numbers.
    fits = x.dtype in (b.dtype, _storage(unit))
    return "" if fits else f"dtype: got {x.dtype}, expected {b.dtype}"


def kind(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}"


def _element(x: Tensor, y: Tensor, at: int) -> str:
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), y.shape)] if y.dim() else []
    got, expected = x.reshape(-1)[at].item(), y.reshape(-1)[at].item()
    return f"at {index} got {got!r}, expected {expected!r}"
