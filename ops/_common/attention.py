"""What the attention ops share: one token's attention in the absorbed form, its cache arguments, its error terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS
from glm5_hal.metadata import evaluate
from glm5_hal.ops._common.precision import stored, up
from glm5_hal.spec import Arg, Constraint

#: The cache arguments of every op over the MLA latent. C is the storage dtype: the format says which.
KV_CACHE = Arg("kv_cache", "N P X", "C", "cache pages, in the named format", layout="page")
ROPE_CACHE = Arg(
    "rope_cache", "N P R", "F", "rope keys, for formats that keep them apart", optional=True, layout="page"
)


def attend(q: Tensor, latent: Tensor, rope: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Queries [H, W] over n >= 1 keys (latent [n, L], rope [n, R]): out [H, L] and natural-log lse [H]."""
    keys = (latent if rope is None else torch.cat([latent, rope], -1)).to(up(q).dtype)
    p, total, lse = softmax(up(q) @ keys.T * scale, q)
    return p @ keys[:, : latent.shape[1]] / total, lse


def softmax(scores: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the last dim, which has a finite score: probabilities before normalisation, stored in the dtype of
    ``like``; their sum, that dim kept; natural-log lse."""
    lse = torch.logsumexp(scores, -1)
    p = stored(torch.exp(scores - scores.amax(-1, keepdim=True)), like)
    return p, p.sum(-1, keepdim=True), lse


def score_amplification(args: Mapping[str, Any]) -> float:
    """How much a relative error of the scores' inner products is magnified: the size of a typical score."""
    return 1.0 + 4.0 * typical_score(args)


def dense_amplification(args: Mapping[str, Any]) -> float:
    """`score_amplification` for sums over all keys: a sequential sum over that many values adds its own error."""
    ends = args["seq_lens"] if "seq_lens" in args else args["cu_seqlens_k"].diff()
    longest = int(ends.max()) if ends.numel() else 0
    return score_amplification(args) + math.sqrt(longest / args["q"].shape[-1])


def typical_score(args: Mapping[str, Any]) -> float:
    """scale · |q| · |k| / sqrt(width), with rms magnitudes; keys are taken to be as large as unit-grid samples."""
    q = args["q"].double()
    return float(args["scale"] * q.square().mean().sqrt() * 1.2 * q.shape[-1] ** 0.5) if q.numel() else 0.0


def cache_constraints(
    latent: str = "kv_lora_rank", rope: str = "W-kv_lora_rank", activations: str = "q"
) -> tuple[Constraint, ...]:
    """A latent format's tensors have its widths and its storage dtype. ``latent`` and ``rope`` are the expressions of
    the two widths in the op's axes."""

    def fits(known: Mapping[str, Any]) -> bool:
        fmt, L, R = FORMATS[known["cache_format"]], evaluate(latent, known), evaluate(rope, known)
        apart = "rope_cache" in known["dtypes"]
        if R <= 0 or (fmt.group and L % fmt.group) or apart != (len(fmt.tensors) == 2):
            return False
        return bool((known["X"], known.get("R"))[: len(fmt.tensors)] == fmt.widths(L, R))

    return (
        Constraint(
            f"kv_cache and rope_cache have the widths of cache_format, for {latent} latent and {rope} rope dims",
            fits,
            "allocate with glm5_hal.cache_format(name).allocate(num_blocks, page_size, latent, rope, dtype=...)",
        ),
        PAGES,
        stores_in("kv_cache", activations),
    )


PAGES = Constraint(
    "a page of a cache has room for one key at least",
    lambda known: bool(known["P"] > 0),
    "allocate with glm5_hal.cache_format(name).allocate(num_blocks, page_size, ...), page_size 64 for example",
)


def stores_in(cache: str, activations: str) -> Constraint:
    """A cache has its format's storage dtype, or that of the activations."""

    def fits(known: Mapping[str, Any]) -> bool:
        wanted = FORMATS[known["cache_format"]].dtype or known["dtypes"][activations]
        return bool(known["dtypes"][cache] == wanted)

    return Constraint(
        f"{cache} has the storage dtype of cache_format (uint8), or that of {activations} where nothing is quantised",
        fits,
        "allocate with glm5_hal.cache_format(name).allocate(..., dtype=activations.dtype)",
        code="DTYPE",
    )
