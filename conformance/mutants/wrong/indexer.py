"""The indexer's scores and its choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import RIGHT, Args, Body
from glm5_hal.conformance.mutants.wrong.attention import FINITE, FP8_READS, PAGED, _beyond, in_storage
from glm5_hal.conformance.mutants.wrong.base import CANONICAL, DETERMINISTIC, FP32, Wrong, bodied

LOGITS: dict[str, dict[str, Any]] = {
    "relu missing": {"relu": lambda s: s},
    "relu after the sum": {"relu": lambda s: s, "heads": lambda w, s: (w @ s).clamp_min(0)},
    "weights without their sign": {"weights": torch.abs},
    "weights in bfloat16": {"weights": lambda w: w.to(torch.bfloat16).float(), "dtypes": FP32},
    "logits in bfloat16": {"heads": lambda w, s: (w @ s).to(torch.bfloat16).float()},
    "sum over heads in bfloat16": {"heads": lambda w, s: in_storage(w[None], s.T.contiguous())[0]},
    "scores in bfloat16": {"relu": lambda s: s.clamp_min(0).to(torch.bfloat16).float()},
    "a head left out": {"heads": lambda w, s: w[:-1] @ s[:-1]},
    "scale applied twice": {"heads": lambda w, s: w @ s * s.shape[0] ** -0.5},
    "0 where nothing is seen": {"nothing": 0.0},
    "lowest number where nothing is seen": {"nothing": torch.finfo(torch.float32).min},
    "scores beyond 32 heads": {"product": lambda q, k: _beyond(32)(q, k)},
    "mask one key short": {"limit": lambda i, new, keys: keys - new + i},
    "mask one key long": {"limit": lambda i, new, keys: min(keys - new + i + 2, keys)},
    "no mask": {"limit": lambda i, new, keys: keys},
    "wrong for several new tokens": {"limit": lambda i, new, keys: keys - new + 1},
    "last key lost": {"limit": lambda i, new, keys: min(keys - new + i + 1, keys - 1)},
    "a stale page": {"reading": PAGED["a stale page"]},
    "pages in order": {"reading": PAGED["pages in order"]},
    "page ids of 16 bits": {"reading": PAGED["page ids of 16 bits"], "by": ("accuracy", "poison")},
    "no products beyond float16": {"relu": lambda s: s.clamp(0.0, 65504.0), "dtypes": ("float16",), "by": FINITE},
    "columns of 16 bits": {"relu": lambda s: s.clamp_min(0)[..., torch.arange(s.shape[-1]) & 0xFFFF]},
    "fp8 scales forgotten": {"reading": FP8_READS["scales forgotten"]},
    "fp8 scale of the next key": {"reading": FP8_READS["the scale of the next key"]},
    "token-major fp8 pages": {"reading": replace(RIGHT, block_major=False)},
    "fp8 scale before the codes": {"reading": replace(RIGHT, fields=lambda fields: tuple(reversed(fields)))},
    "rope dims ignored": {"product": lambda q, k: q[..., 64:] @ k[..., 64:].mT},
}


def zero_is_small(row: Tensor, k: int) -> Tensor:
    """0.0 before -0.0."""
    key = row.double() - 1e-9 * (torch.signbit(row) & (row == 0))
    return key.argsort(descending=True, stable=True)[:k]


def by_magnitude(row: Tensor, k: int) -> Tensor:
    return row.abs().argsort(descending=True, stable=True)[:k]


def in_half(row: Tensor, k: int) -> Tensor:
    return row.to(torch.bfloat16).argsort(descending=True, stable=True)[:k]


def positive_only(row: Tensor) -> Tensor:
    return row > 0


def one_worse(row: Tensor, k: int) -> Tensor:
    """The best but the k-th, and the one after it."""
    order = row.argsort(descending=True, stable=True)
    return torch.cat([order[: k - 1], order[k : k + 1]]) if len(row) > k else order


def random_ties(row: Tensor, k: int) -> Tensor:
    order = torch.randperm(len(row))
    return order[row[order].argsort(descending=True, stable=True)[:k]]


def with_duplicates(row: Tensor, k: int) -> Tensor:
    best = honest.by_sort(row, k)
    return torch.cat([best[:-1], best[:1]]) if len(best) > 1 else best


CHOICES: dict[str, tuple[Body, str | tuple[str, ...], Sequence[str]]] = {
    "other order of equals": (honest.topk(honest.last_of_ties), "accuracy", CANONICAL),
    "equals at random": (honest.topk(random_ties), ("rerun", "poison", "plan"), ("deterministic", "sorted_indices")),
    "best first": (honest.topk(ascending=False), "accuracy", CANONICAL),
    "the k-th passed over": (honest.topk(one_worse), "accuracy", DETERMINISTIC),
    "duplicates": (honest.topk(with_duplicates), "accuracy", DETERMINISTIC),
    "smallest": (honest.topk(lambda row, k: row.argsort()[:k]), "accuracy", DETERMINISTIC),
    "the first ones": (honest.topk(lambda row, k: torch.arange(min(k, len(row)))), "accuracy", DETERMINISTIC),
    "fewer than there are": (honest.topk(lambda row, k: honest.by_sort(row, k - 1)), "accuracy", DETERMINISTIC),
    "positive scores only": (honest.topk(eligible=positive_only), "accuracy", DETERMINISTIC),
    "by magnitude": (honest.topk(by_magnitude), "accuracy", DETERMINISTIC),
    "0 as filling": (honest.topk(fill=0), "accuracy", DETERMINISTIC),
}

TOPK_ONLY: dict[str, tuple[Body, str | tuple[str, ...], Sequence[str]]] = {
    "NaN chosen": (honest.topk(eligible=lambda row: row != -torch.inf), "accuracy", DETERMINISTIC),
    "-inf chosen": (honest.topk(eligible=lambda row: ~row.isnan()), "accuracy", DETERMINISTIC),
    "0.0 before -0.0": (honest.topk(zero_is_small), "accuracy", CANONICAL),
    "lowest number taken for a mask": (honest.topk(eligible=lambda row: row > torch.finfo(torch.bfloat16).min), "accuracy", DETERMINISTIC),
    "compared in bfloat16": (honest.topk(in_half), "accuracy", DETERMINISTIC),
    "garbage beyond the row": (honest.topk(length=lambda n: 1 << 30), "accuracy", DETERMINISTIC),
    "last score of a row lost": (honest.topk(length=lambda n: max(n - 1, 0)), "accuracy", DETERMINISTIC),
    "reads one score too many": (honest.topk(length=lambda n: n + 1), "accuracy", DETERMINISTIC),
}  # fmt: skip


def zero_filled() -> Body:
    """Keys that a token does not see score 0, and so beat negative ones."""
    score, choose = honest.logits(nothing=0.0), honest.topk()
    return honest.indexer(score, choose)


def unsorted_when_few(a: Args) -> Any:
    """Wrong only where there are fewer keys than top_k: all positions, seen or not."""
    out = honest.indexer()(a)
    for t, row in enumerate(out):
        if (row < 0).any():
            out[t] = torch.arange(a.top_k).int() if len(row) else row
    return out


def the_indexer() -> list[Wrong]:
    found = []
    for name, how in LOGITS.items():
        dtypes = how.get("dtypes", ("bfloat16",))
        by, arguments = how.get("by", "accuracy"), {k: v for k, v in how.items() if k not in ("dtypes", "by")}
        found.append(bodied("indexer_logits", name, honest.logits(**arguments), by, dtypes=dtypes))
        if name not in EQUIVALENT:
            whole = honest.indexer(honest.logits(**arguments))
            found.append(bodied("lightning_indexer", name, whole, by, dtypes=dtypes))
    for name, (body, by, provides) in CHOICES.items():
        found.append(bodied("topk_indices", name, body, by, provides=provides))
        found.append(bodied("lightning_indexer", name, honest.indexer(choose=body), by, provides=provides))
    for name, (body, by, provides) in TOPK_ONLY.items():
        dtypes = FP32 if "bfloat16" in name else ("bfloat16",)
        found.append(bodied("topk_indices", name, body, by, provides=provides, dtypes=dtypes))
    found += [
        bodied("lightning_indexer", "what is not seen beats negative scores", zero_filled()),
        bodied("lightning_indexer", "all positions where there are few keys", unsorted_when_few),
        bodied("lightning_indexer", "reads unused slots", _indexer_reads_unused(), "poison"),
    ]
    return found


#: What does not change the choice, beyond what fp32 may.
EQUIVALENT = ("scale applied twice", "lowest number where nothing is seen", "0 where nothing is seen")


def _indexer_reads_unused() -> Body:
    right = honest.logits()

    def score(a: Args) -> Any:
        return right(a) + a.index_cache.float().sum() * 0

    return honest.indexer(score)
