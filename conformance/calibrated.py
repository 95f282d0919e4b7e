"""Row by row against float64, with the budget that an honest emulation sets. Letters as in `compare`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from glm5_hal.conformance.compare import Judgement, element, first_failed, mistrust, unlike
from glm5_hal.conformance.rounding import TINY, blocks, half_spacing, stored, strange

#: A row this long samples the emulation's noise well enough to judge single elements by it. In a shorter row one wrong
#: element already is a large part of the row's error.
LONG = 64


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
    problem = unlike(x, y, b, unit)
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
    detail = f"{failed}; {int(bad_R.sum())} of {R} rows are wrong by themselves; {element(x, y, at)}"
    return Judgement(False, errors, budget, detail)


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
    d, y, finite, odd = _difference(x, y, unit)
    d_b = torch.where(finite, stored(b, unit) - y, 0.0)
    half = half_spacing(y, unit)
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
        strange=odd.sum(1),
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
    d, y, finite, odd = _difference(x, y, unit)
    rms_R = y.norm(dim=1) / finite.sum(1).clamp_min(1).sqrt()
    floor = 4 * floor_R[:, None] * torch.maximum(y.abs(), rms_R[:, None])
    allowed = 3 * half_spacing(y, unit) + slack_R[:, None] + floor
    over = d.abs() / allowed
    return torch.where(odd, torch.finfo(torch.float64).max, over)


def _difference(x: Tensor, y: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x−y and y with zeros for what is not finite, where y is finite, and where x's inf or NaN is not y's."""
    kept, x = stored(y, unit), x.double()  # an honest kernel overflows where y's storage does
    finite, odd = kept.isfinite(), strange(x, kept)
    y = torch.where(finite, y, 0.0)
    return torch.where(finite & ~odd, x - y, 0.0), y, finite, odd


def _concentration(size_R: Tensor) -> float:
    """1/√R, with R the effective number of rows: equal rows count whole, small ones hardly."""
    squares = size_R.square()
    return (squares.square().sum().sqrt() / squares.sum().clamp_min(TINY)).item()
