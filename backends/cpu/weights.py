"""Weights of the prologs packed once, when they are loaded: see `glm5_hal.ops._common.packed`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from glm5_hal.ops._common.packed import pack
from glm5_hal.prepared import Prepared

#: Ops whose weights every token passes. Experts are too many to be kept twice.
PACKED = ("indexer_prolog", "mla_prolog")


def prepare(op: str, weights: Mapping[str, Tensor]) -> Prepared | None:
    """The plain weights themselves, in their plain format: what was packed lies beside them."""
    if op not in PACKED:
        return None
    return Prepared(op, {name: pack(weight.contiguous()) for name, weight in weights.items()})
