"""Weights in the vendor's own format, made once when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from glm5_hal.prepared import Prepared

#: What our kernels call weights in FRACTAL_NZ, and the number of that format.
NZ = "ascend_nz"
FRACTAL_NZ = 29

#: Documented hidden sizes, query ranks and nope dims of npu_mla_prolog_v3.
HIDDEN = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
RANKS = (1536, 2048)
NOPE = (128, 192)

#: Those of its weights that it wants so.
IN_NZ = ("w_q_a", "w_q_b", "w_kv_a")


def fits(hidden: int, rank: int, nope: int) -> bool:
    return hidden in HIDDEN and rank in RANKS and nope in NOPE


def prepare(op: str, weights: Mapping[str, Tensor]) -> Prepared | None:
    """mla_prolog's projections in FRACTAL_NZ, [in, out] beneath their shape of [out, in]; all others as they are.

    Weights that the fused op does not take stay plain, so that the op's parts can use them.
    """
    if op != "mla_prolog" or not _taken(weights):
        return None
    made = {name: in_nz(weight) if name in IN_NZ else weight.contiguous() for name, weight in weights.items()}
    return Prepared(op, made, NZ)


def _taken(weights: Mapping[str, Tensor]) -> bool:
    if not {*IN_NZ, "w_uk"} <= weights.keys():
        return False
    rank, hidden = weights["w_q_a"].shape
    one_dtype = all(weight.dtype == torch.bfloat16 for weight in weights.values())
    return one_dtype and fits(hidden, rank, weights["w_uk"].shape[1])


def in_nz(weight: Tensor) -> Tensor:
    """[out, in] over [in, out] in FRACTAL_NZ. torch_npu keeps such formats only where it is told that it may."""
    npu = getattr(torch, "npu", None)
    if npu is not None:
        npu.config.allow_internal_format = True
    turned: Tensor = torch.ops.npu.npu_format_cast(weight.t().contiguous(), FRACTAL_NZ)
    return turned.t()
