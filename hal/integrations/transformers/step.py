"""What every layer of one forward pass shares: positions, slots, lengths. Built once, by the cache.

Legend: B rows of the batch, S columns of this pass, T real tokens among them (all B·S without padding).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_hal.plan import StepPlan


@dataclass(frozen=True, eq=False)
class Step:
    """Where the tokens of a pass stand.

    Attributes:
        rows: places of the real tokens among the B·S, [T] int64; None where all are real.
        slots: cache slot of each token, [T] int64.
        block_table: [B, M] int32.
        seq_lens: cached keys of each row, new ones included, [B] int32.
        cu_seqlens_q: offsets of each row's tokens, [B+1] int32.
        columns: S.
        real: which columns hold a real token, [B, S] bool; None where all do.
        first: whether nothing was cached before.
        longest: the largest of ``seq_lens``.
        plan: host copies for kernels; None in compiled code, which has no host.
    """

    rows: Tensor | None
    slots: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    columns: int
    real: Tensor | None
    first: bool
    longest: int
    plan: StepPlan | None

    def take(self, x: Tensor) -> Tensor:
        """The real tokens of ``x [B·S, ...]``: [T, ...]."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def put(self, y: Tensor, total: int) -> Tensor:
        """``y [T, ...]`` back in its places, zeros for padding: [total, ...]."""
        return y if self.rows is None else y.new_zeros(total, *y.shape[1:]).index_copy_(0, self.rows, y)


@contextmanager
def active(step: Step) -> Iterator[None]:
    """Let kernels see the step's plan."""
    if step.plan is None:
        yield
        return
    with step.plan.active():
        yield


def decode_slots(block_table: Tensor, positions: Tensor, page: int) -> Tensor:
    """Slots of ``positions [B, S]``, local to their rows: [B·S] int64."""
    return (block_table.gather(1, positions // page) * page + positions % page).flatten()


def offsets(counts: Tensor) -> Tensor:
    """[B] counts as [B+1] int32 offsets."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
