"""What attention gives where the vendor's documents say nothing: to tokens without keys, and to scores that are all
-inf."""

from __future__ import annotations

import torch
from torch import Tensor


def ours(out: Tensor, lse: Tensor, blind: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The results, with those of tokens [T] that see no key; and where no score is above -inf, NaN."""
    if blind is None:
        return out.masked_fill_((lse == -torch.inf)[..., None], torch.nan), lse
    lse = lse.masked_fill(blind[:, None], -torch.inf)
    value = torch.where(blind, 0.0, torch.nan)[:, None, None].to(out.dtype)
    return torch.where((lse == -torch.inf)[..., None], value, out), lse


def no_keys(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The results where nobody sees a key."""
    T, H, _ = q.shape
    return q.new_zeros(T, H, width), q.new_full((T, H), -torch.inf, dtype=torch.float32)
