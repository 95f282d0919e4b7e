"""Which columns of a batch hold real tokens, and which are padding.

Legend: B rows of the batch, C columns that have passed, S new columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm5_hal.integrations.transformers.checks import refuse


class Padding:
    """The padding of a batch. Nothing is written down of a batch without any, nor of columns after the last mask.

    Attributes:
        rows: how many padding columns each row has had, on the host. Empty until there is a batch.
        counts: the same on the device, [B] int64.
        real: which of the first columns hold a real token, [B, up to C] bool; None if all do.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: tuple[int, ...] = ()
        self.counts = torch.empty(0)
        self.real: Tensor | None = None

    def begin(self, batch: int) -> None:
        """A batch of so many rows, with no padding so far."""
        with torch.inference_mode(False):
            self._set(torch.zeros(batch, dtype=torch.int64, device=self.device), (0,) * batch, None)

    def tokens(self, seen: int) -> list[int]:
        """How many real tokens each row has after ``seen`` columns."""
        return [seen - p for p in self.rows]

    def mask(self, seen: int) -> Tensor:
        """[B, C]: which of the first ``seen`` columns hold a real token."""
        known = 0 if self.real is None else self.real.shape[1]
        later = torch.ones(len(self.rows), seen - known, dtype=torch.bool, device=self.device)
        return later if self.real is None else torch.cat([self.real, later], 1)

    def new(self, seen: int, columns: int, mask: Tensor | None) -> Tensor | None:
        """[B, S]: which new columns are real by a ``mask [B, C+S]``; None if all are.

        Raises:
            HalError: SHAPE for a mask of another shape, VALUE for one that contradicts what has passed.
        """
        if mask is None:
            if self.real is not None:
                refuse(
                    "VALUE",
                    "this pass has no attention_mask, but earlier ones had padding",
                    fix="pass the whole mask, [batch, all columns so far and the new ones]",
                )
            return None
        wanted = (len(self.rows), seen + columns)
        if tuple(mask.shape) != wanted:
            refuse(
                "SHAPE",
                f"attention_mask has shape {tuple(mask.shape)}, here it must be {wanted}: rows, columns so far and new",
                value=tuple(mask.shape),
                fix="pass the 2D mask of real tokens; masks of other forms (4D, blocks) are not supported",
            )
        mask = mask.to(device=self.device, dtype=torch.bool)
        if torch.compiler.is_compiling():
            self._assert(mask)
            return None
        if not torch.equal(mask[:, :seen], self.mask(seen)):
            refuse(
                "VALUE",
                "attention_mask calls tokens of earlier passes padding that were real then, or the other way round",
                fix="keep the mask of earlier columns as it was; to hide tokens, start a new cache",
            )
        real = mask[:, seen:]
        return None if bool(real.all()) else real

    def _assert(self, mask: Tensor) -> None:
        """Compiled code has no host to look: it takes no new padding, and asserts on the device that there is none."""
        known = 0 if self.real is None else self.real.shape[1]
        if self.real is not None:
            torch._assert_async((mask[:, :known] == self.real).all(), "attention_mask changed in earlier columns")
        torch._assert_async(mask[:, known:].all(), "compiled passes take no new padding")

    def extend(self, seen: int, real: Tensor) -> None:
        """Count new columns ``real [B, S]`` after ``seen`` ones."""
        counts = self.counts + real.shape[1] - real.sum(1)
        self._set(counts, counts.tolist(), torch.cat([self.mask(seen), real], 1))

    def crop(self, kept: int) -> None:
        """Forget all but the first ``kept`` columns."""
        if self.real is not None and self.real.shape[1] > kept:
            counts = self.counts - (~self.real[:, kept:]).sum(1)
            self._set(counts, counts.tolist(), self.real[:, :kept])

    def left(self, lengths: Sequence[int]) -> None:
        """Rows of ``lengths`` tokens and as many columns as the longest has, padded on the left."""
        rows = [max(lengths, default=0) - n for n in lengths]
        counts = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._set(counts, rows, torch.arange(max(lengths, default=0), device=self.device) >= counts[:, None])

    def take(self, rows: Sequence[int]) -> None:
        """The batch becomes copies of these rows."""
        places = torch.tensor(rows, dtype=torch.int64, device=self.device)
        real = None if self.real is None else self.real.index_select(0, places)
        self._set(self.counts.index_select(0, places), [self.rows[r] for r in rows], real)

    def _set(self, counts: Tensor, rows: Sequence[int], real: Tensor | None) -> None:
        """Where no padding is left, none is remembered: later passes need no mask."""
        self.counts, self.rows, self.real = counts, tuple(rows), real if any(rows) else None
