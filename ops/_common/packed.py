"""Weights that oneDNN has reordered once, beside the plain ones.

A product over weights that lie [out, in] reorders them on its way, every time. On two cores of a Zen 5 that is what one
row over 200 MB waits for: 8.3 ms in bfloat16, where the reordered weights take 2.6 ms, the speed of memory; 7.8 and
5.1 ms in float32. They take the weights' size in memory again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from glm5_hal.memory import state

#: Elements of weights from which reordering them is worth its memory.
LARGE = 1 << 18
#: Rows to reorder for: weights for one row of float32 would be left as they are, and serve more rows badly.
ROWS = 16

_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


@dataclass(frozen=True, eq=False)
class Packed:
    """Weights as oneDNN likes them, and what the plain ones were then."""

    weight: Tensor
    state: tuple[Any, ...]


#: By the plain weights, as long as those live. A copy of them is another tensor and begins without.
_packed: Any = WeakTensorKeyDictionary()


def pack(weight: Tensor) -> Tensor:
    """The same tensor, [out, in]. If it is large and its products would run on oneDNN, they are faster from now on.

    Weights that are written or replaced later are multiplied as they are then, slowly: pack them again. Not every write
    is counted: those through ``weight.data`` and those to tensors made in ``torch.inference_mode()`` are not seen.
    """
    if _is_taken(weight):
        _packed[weight] = Packed(_reorder(weight.detach(), ROWS), state(weight))
    return weight


def packed(weight: Tensor) -> Tensor | None:
    """What `pack` made of these weights, unless they have changed since."""
    kept = _packed.get(weight) if _packed else None
    return kept.weight if kept is not None and kept.state == state(weight) else None


def _is_taken(weight: Tensor) -> bool:
    return (
        _reorder is not None
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and weight.dim() == 2
        and weight.numel() >= LARGE
        and weight.is_contiguous()
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and (weight.dtype == torch.float32 or _has_bfloat16(weight))
    )


def _has_bfloat16(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
