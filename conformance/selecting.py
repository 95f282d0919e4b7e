"""Judging a choice: top-k and routing, by threshold on float64 scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glm5_hal.conformance.compare import Judgement, first_failed, kind, mistrust
from glm5_hal.conformance.rounding import blocks


def selection(
    indices: Tensor, scores: Tensor, tau: float | Tensor, *, canonical: bool, sorted_: bool, padded: bool = True
) -> Judgement:
    """Chosen indices [T, K] by threshold on float64 scores [T, S]; a score of -inf or NaN is not eligible.

    Which of several scores within tau of the K-th are taken is free, unless `canonical`: then the set is exactly that
    of the total order (score descending, index ascending, 0.0 equal to -0.0) of the scores as given. Every eligible
    score is taken if there are at most K; -1 fills the tail. ``sorted_``: the indices ascend.
    """
    T, K = (*indices.shape, 0)[:2]
    if indices.dtype != torch.int32 or indices.dim() != 2 or scores.shape[:1] != (T,):
        return Judgement(False, detail=f"got {kind(indices)}, expected int32 [T, K] with T = {scores.shape[0]}")
    tau_T = torch.as_tensor(tau, dtype=torch.float64).expand(T)
    if not (tau_T >= 0).all():
        return mistrust("tau is negative or NaN")
    if not padded and ((scores > -math.inf).sum(1) < K).any():  # NaN compares false
        return mistrust(f"fewer than {K} scores are eligible, and the op has no padding")
    parts = [
        _select(indices[i].long(), scores[i].double(), tau_T[i], canonical, sorted_)
        for i in blocks(T, max(scores.shape[1], K))
    ]
    if not parts:
        return Judgement(True)
    wrong = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    errors, budget = {name: float(bad_T.sum()) for name, bad_T in wrong.items()}, dict.fromkeys(wrong, 0.0)
    failed = first_failed(errors, budget)
    if not failed:
        return Judgement(True, errors, budget)
    bad_T = torch.stack([*wrong.values()]).any(0)
    t = int(bad_T.int().argmax())
    row = ", ".join(name for name, bad in wrong.items() if bad[t])
    chosen = indices[t].tolist()
    shown = f"{chosen[:16]}{'…' if K > 16 else ''}"
    return Judgement(False, errors, budget, f"{failed}; {int(bad_T.sum())} of {T} rows; first row {t} ({row}): {shown}")


def _select(idx: Tensor, scores: Tensor, tau_T: Tensor, canonical: bool, sorted_: bool) -> dict[str, Tensor]:
    """Which rows break which rule."""
    T, S = scores.shape
    K = idx.shape[1]
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    eligible, valid = scores > -math.inf, idx >= 0
    inside = valid & (idx < S)
    picked = torch.zeros(T, S + 1, dtype=torch.bool).scatter_(1, torch.where(inside, idx, S), True)[:, :S]
    k = min(K, S)
    kth_T = scores.topk(k).values[:, -1] if k else scores.new_full((T,), math.inf if K == 0 else -math.inf)
    chosen, unchosen = picked & eligible, eligible & ~picked
    wrong = {
        "invalid index": ((idx < -1) | (idx >= S)).any(1),
        "not eligible": (picked & ~eligible).any(1),
        "duplicate": inside.sum(1) != picked.sum(1),
        "count": valid.sum(1) != eligible.sum(1).clamp_max(K),
        "-1 before the tail": (valid[:, 1:] & ~valid[:, :-1]).any(1),
        "chosen below the k-th": (chosen & (scores < (kth_T - tau_T)[:, None])).any(1),
        "unchosen above the k-th": (unchosen & (scores > (kth_T + tau_T)[:, None])).any(1),
    }
    if canonical:
        above, tied = scores > kth_T[:, None], (scores == kth_T[:, None]) & eligible
        places = K - above.sum(1, keepdim=True)
        wrong["not the canonical set"] = (picked != (above | tied & (tied.cumsum(1) <= places))).any(1)
    if sorted_:
        wrong["not ascending"] = (valid[:, 1:] & (idx[:, 1:] <= idx[:, :-1])).any(1)
    return wrong
