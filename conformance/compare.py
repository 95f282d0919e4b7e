"""How an output is judged: pure functions of CPU tensors.

Letters: x the kernel's output, y the float64 oracle, b an honest emulation of the contract's roundings, u the unit
roundoff of the storage dtype. A *row* is the vector that one unit of work produces (one token and head, say); tensors
named ``_R`` hold one number per row. A budget is made of the emulation's own error, the rounding of the result, which
nobody can avoid, and a floor for the order of accumulation. Nothing in it is per vendor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from glm5_hal.conformance.rounding import TINY, storage, strange
from glm5_hal.errors import HalError


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


def absolute(x: Tensor, y: Tensor, b: Tensor, *, unit: float, floor: float | Tensor = 0.0) -> Judgement:
    """Element by element, for log-sum-exp: |x−y| <= 4 max|b−y| + floor + 4 u max(|y|, 1), infinities where y has them.

    A relative error would mean nothing here, because the logarithm passes through zero.
    """
    problem = unlike(x, y, b, unit)
    if problem or y.numel() == 0:
        return Judgement(not problem, detail=problem)
    X, Y = x.reshape(-1).double(), y.reshape(-1).double()
    odd, finite = strange(X, Y), Y.isfinite()
    honest = (b.reshape(-1).double() - Y).abs()[finite]
    allowed = torch.as_tensor(floor, dtype=torch.float64).expand(y.shape).reshape(-1) + 4 * unit * Y.abs().clamp_min(1)
    if not (honest.isfinite().all() and allowed[finite].isfinite().all()):
        return mistrust("the emulation or the floor is not finite where the oracle is")
    allowed = allowed + 4 * (honest.max() if honest.numel() else 0.0)
    error = torch.where(finite & ~odd, (X - Y).abs(), 0.0)
    worst = int(torch.where(finite, error / allowed.clamp_min(TINY), -1.0).argmax())
    errors = {"nonfinite": float(odd.sum()), "absolute": error[worst].item()}
    budget = {"nonfinite": 0.0, "absolute": allowed[worst].item() if finite.any() else 0.0}
    failed = first_failed(errors, budget)
    if not failed:
        return Judgement(True, errors, budget)
    wrong = odd | (finite & (error > allowed))
    detail = f"{failed}; {int(wrong.sum())} of {y.numel()} are wrong; {element(x, y, int(wrong.int().argmax()))}"
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
    detail = f"bits: {int(wrong.sum())} of {y.numel()} elements differ, in {rows} rows; {element(x, y, at)}{sign}"
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


def first_failed(errors: dict[str, float], budget: dict[str, float]) -> str:
    return ", ".join(f"{k}: {errors[k]:.3g} > {budget[k]:.3g}" for k in errors if not errors[k] <= budget[k])


def mistrust(why: str) -> Judgement:
    return Judgement(False, detail=why, mistrusted=True)


def unlike(x: Tensor, y: Tensor, b: Tensor, unit: float) -> str:
    if b.shape != y.shape:
        raise HalError("CONTRACT", f"emulation {kind(b)}, oracle {kind(y)}", fix="both are runs of one reference")
    if x.shape != y.shape:
        return f"shape: got {list(x.shape)}, expected {list(y.shape)}"
    # Else a coarser result would be measured with a coarser budget. b may be a wider carrier of storage numbers.
    fits = x.dtype in (b.dtype, storage(unit))
    return "" if fits else f"dtype: got {x.dtype}, expected {b.dtype}"


def kind(t: Tensor) -> str:
    return f"{t.dtype} {list(t.shape)}"


def element(x: Tensor, y: Tensor, at: int) -> str:
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), y.shape)] if y.dim() else []
    got, expected = x.reshape(-1)[at].item(), y.reshape(-1)[at].item()
    return f"at {index} got {got!r}, expected {expected!r}"
