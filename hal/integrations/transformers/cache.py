"""transformers' `Cache` interface over paged tensors in a backend's own format.

Legend: B rows of the batch, N pages, P page size, S new columns.

Only real tokens are stored: a row's padding takes no slot, so the keys of a row are its tokens in order, wherever its
padding stands, and the operators need no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from glm5_hal.integrations.transformers import memory
from glm5_hal.integrations.transformers.checks import refuse
from glm5_hal.integrations.transformers.pages import Pages
from glm5_hal.integrations.transformers.step import Step, decode_slots, offsets
from glm5_hal.state import StepPlan


class PagedCache(Cache):  # type: ignore[misc] # transformers has no types
    """A paged cache of MLA latents and index keys for a model that `apply` was called on.

    Grows as it is used. Compiled code cannot grow it: give ``batch_size`` and ``max_length``, or call `reserve`, first.

    Args:
        model: the model, its inner decoder, or the layout of a cache for something else.
        batch_size, max_length: rows and tokens per row to reserve room for; 0 leaves both open.
        keep: whether what is written is needed after the pass; if not, one layer's memory serves all.

    Attributes:
        seen: columns of the batch that have passed, padding included.
        latent: each layer's tensors of the latent format, ``[N, P, width]``.
        index: each layer's index keys, ``[N, P, width]``; None where a layer has no indexer.
        block_table: ``[B, M]`` int32.
    """

    def __init__(self, model: Any, *, batch_size: int = 0, max_length: int = 0, keep: bool = True) -> None:
        from glm5_hal.integrations.transformers.models import applied

        super().__init__(layers=[])
        self.layout: memory.Layout = model if isinstance(model, memory.Layout) else applied(model).layout
        self.latent: list[tuple[Tensor, ...]] = []
        self.index: list[Tensor | None] = []
        self._keep = keep
        self.seen = 0
        self._pages = Pages(self.layout.page_size)
        self._pads = torch.empty(0)
        self._pads_host: tuple[int, ...] = ()
        self._real: Tensor | None = None
        self._ready = 0
        if batch_size and max_length:
            self.reserve(max_length, batch_size=batch_size)

    # --- a pass ------------------------------------------------------------------------------------------------------

    def step(self, batch: int, columns: int, mask: Tensor | None) -> Step:
        """The places of ``columns`` new tokens of each row.

        Args:
            batch: B.
            columns: S.
            mask: [B, seen + S], nonzero for real tokens; None where there is no padding.

        Raises:
            HalError: SHAPE for a mask that is not of that shape or for another batch, VALUE where the mask calls
                tokens padding that were real before or the other way round.
        """
        if not self._pads_host:
            self._begin(batch)
        if batch != len(self._pads_host):
            refuse(
                "SHAPE",
                f"the cache holds {len(self._pads_host)} rows, this pass has {batch}",
                value=batch,
                fix="give every batch a cache of its own, or reset() this one",
            )
        real = self._new_columns(batch, columns, mask)
        before, end = self.seen - self._pads, self.seen + columns  # [B]: tokens in the cache
        longest = end - min(self._pads_host)
        compiling = torch.compiler.is_compiling()
        counts = [columns] * batch if real is None else real.sum(1).tolist()
        if end > self._ready:
            if compiling:
                refuse(
                    "CONFIG",
                    f"compiled code cannot grow the cache: it has room for {self._ready} columns",
                    value=end,
                    fix="call cache.reserve(max_length, batch_size=...) before the first compiled step",
                )
            self._claim(counts)
        if real is None:
            rows = None
            positions = before[:, None] + torch.arange(columns, device=before.device)
            seq_lens = (before + columns).int()
            cu = torch.arange(0, batch * columns + 1, columns, dtype=torch.int32, device=before.device)
        else:
            rows = real.flatten().nonzero()[:, 0]
            positions = (before[:, None] + real.cumsum(1) - 1).masked_fill(~real, 0)
            taken = real.sum(1)
            seq_lens, cu = (before + taken).int(), offsets(taken)
            longest = max(self.seen - p + n for p, n in zip(self._pads_host, counts, strict=True))
        slots = decode_slots(self.block_table.long(), positions, self.layout.page_size)
        plan = None
        if not compiling:
            host = [self.seen - p + n for p, n in zip(self._pads_host, counts, strict=True)]
            ends = [sum(counts[:r]) for r in range(batch + 1)]
            plan = StepPlan.build(seq_lens, cu, host_seq_lens=host, host_cu_seqlens_q=ends)
        return Step(
            rows=rows,
            slots=slots if rows is None else slots.index_select(0, rows),
            block_table=self.block_table,
            seq_lens=seq_lens,
            cu_seqlens_q=cu,
            columns=columns,
            real=real,
            first=self.seen == 0,
            longest=longest,
            plan=plan,
        )

    def advance(self, step: Step) -> None:
        """Count a pass that has run: its tokens are in the cache now."""
        if step.real is not None:
            self._real = torch.cat([self.mask, step.real], 1)
            self._pads = self._pads + step.columns - step.real.sum(1)
            self._pads_host = tuple(self._pads.tolist())
        self.seen = self.seen + step.columns

    def reserve(self, max_length: int, *, batch_size: int = 0) -> None:
        """Room for ``max_length`` columns of every row, so that no later pass changes a tensor's shape until then."""
        if not self._pads_host:
            self._begin(batch_size)
        if batch_size not in (0, len(self._pads_host)):
            refuse(
                "SHAPE",
                f"the cache holds {len(self._pads_host)} rows, not {batch_size}",
                value=batch_size,
                fix="reset() it, or leave batch_size out",
            )
        self._claim([max_length - self.seen + p for p in self._pads_host])
        self._ready = max_length

    # --- transformers' interface -------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.layout.indexed)

    def __repr__(self) -> str:
        formats = f"{self.layout.latent.name}, {self.layout.index.name}"
        return f"PagedCache({len(self)} layers, {self.batch_size} rows, {self.seen} columns, {formats})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        refuse(
            "CONFIG",
            "a PagedCache is written by the operators; this model's attention is transformers' own",
            fix="call apply(model) before the model runs with this cache",
        )

    update_indexer = update

    def reset(self) -> None:
        """Forget every token. The memory is kept."""
        self.seen, self._ready = 0, 0
        self._pages = Pages(self.layout.page_size)
        self._pads_host, self._real = (), None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns (transformers counts them negatively)."""
        if tokens_to_remove > 0:
            refuse(
                "SCALAR",
                f"crop({tokens_to_remove}): the number of columns to remove is negative, as in transformers",
                value=tokens_to_remove,
                fix="cache.crop(-n) removes n",
            )
        kept = max(self.seen + tokens_to_remove, 0)
        if self._real is not None and self._real.shape[1] > kept:
            self._pads = self._pads - (~self._real[:, kept:]).sum(1)
            self._pads_host, self._real = tuple(self._pads.tolist()), self._real[:, :kept]
        self.seen = kept
        if self._pages.shared:  # it may reach back into a page that another row reads
            self._ready = 0

    def crop_rows(self, lengths: Tensor) -> None:
        """Keep each row's first ``lengths [B]`` tokens. Its columns are then those of a batch padded on the left."""
        kept, held = lengths.tolist(), [self.seen - p for p in self._pads_host]
        if len(kept) != len(held) or not all(0 <= n <= h for n, h in zip(kept, held, strict=True)):
            refuse(
                "VALUE",
                f"crop_rows({kept}): the rows hold {held} tokens",
                value=kept,
                fix="give every row a length between 0 and what it holds",
            )
        self.seen = max(kept, default=0)
        self._pads, self._pads_host = self.seen - lengths.to(self.layout.device), tuple(self.seen - n for n in kept)
        self._real = (
            torch.arange(self.seen, device=self._pads.device) >= self._pads[:, None] if any(self._pads_host) else None
        )
        if self._pages.shared:  # as in crop
            self._ready = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(self.batch_size).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Nothing to do: every column can be forgotten again."""

    @property
    def mask(self) -> Tensor:
        """[B, seen]: which columns so far hold a real token."""
        known = 0 if self._real is None else self._real.shape[1]
        later = torch.ones(self.batch_size, self.seen - known, dtype=torch.bool, device=self.layout.device)
        return later if self._real is None else torch.cat([self._real, later], 1)

    @property
    def batch_size(self) -> int:
        return len(self._pads_host)

    @property
    def is_initialized(self) -> bool:
        return bool(self.latent)

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """No: that word makes `generate` build 4D masks. `torch.compile` of a model with this cache works."""
        return False

    # --- padding and pages -------------------------------------------------------------------------------------------

    def _begin(self, batch: int) -> None:
        self._pads_host = (0,) * batch
        self._pages.tables = [[] for _ in range(batch)]
        with torch.inference_mode(False):
            self._pads = torch.zeros(batch, dtype=torch.int64, device=self.layout.device)
        self._table()

    def _new_columns(self, batch: int, columns: int, mask: Tensor | None) -> Tensor | None:
        """[B, S]: which new columns are real; None if all are."""
        if mask is None:
            if self._real is not None:
                refuse(
                    "VALUE",
                    "this pass has no attention_mask, but earlier ones had padding",
                    fix="pass the whole mask, [batch, all columns so far and the new ones]",
                )
            return None
        wanted = (batch, self.seen + columns)
        if tuple(mask.shape) != wanted:
            refuse(
                "SHAPE",
                f"attention_mask has shape {tuple(mask.shape)}, here it must be {wanted}: rows, columns so far and new",
                value=tuple(mask.shape),
                fix="pass the 2D mask of real tokens; masks of other forms (4D, blocks) are not supported",
            )
        mask = mask.to(device=self.layout.device, dtype=torch.bool)
        if torch.compiler.is_compiling():  # no host to look: compiled passes have no new padding, and say so if they do
            known = 0 if self._real is None else self._real.shape[1]
            torch._assert_async(mask[:, known:].all(), "compiled passes take no new padding")
            return None
        if not torch.equal(mask[:, : self.seen], self.mask):
            refuse(
                "VALUE",
                "attention_mask calls tokens of earlier passes padding that were real then, or the other way round",
                fix="keep the mask of earlier columns as it was; to hide tokens, start a new cache",
            )
        real = mask[:, self.seen :]
        return None if bool(real.all()) else real

    def _claim(self, new: Sequence[int]) -> None:
        """Pages for ``new[r]`` more tokens of each row."""
        lengths = [self.seen - p for p in self._pads_host]
        copies, changed = self._pages.claim(lengths, [n + k for n, k in zip(lengths, new, strict=True)])
        self._grow(self._pages.count)
        if copies:
            source, target = (torch.tensor(pages, device=self.layout.device) for pages in zip(*copies, strict=True))
            for tensor in memory.tensors(self.latent, self.index):
                tensor[target] = tensor[source]
        if changed:
            self._table()

    def _table(self) -> None:
        """The block table as a tensor. Its width is a power of two: calls of a new shape are resolved anew."""
        width = 1 << (max(map(len, self._pages.tables), default=1) - 1).bit_length()
        rows = [[*table, *[0] * (width - len(table))] for table in self._pages.tables]
        with torch.inference_mode(False):
            self.block_table = torch.tensor(rows, dtype=torch.int32, device=self.layout.device)

    def _grow(self, pages: int) -> None:
        held = self.latent[0][0].shape[0] if self.latent else 0
        if pages <= held:
            return
        before = self.latent, self.index
        with torch.inference_mode(False):  # whatever mode this pass runs in, a later one must be able to write
            self.latent, self.index = memory.allocated(self.layout, max(pages, 2 * held), self._keep)
        for new, old in zip(memory.tensors(self.latent, self.index), memory.tensors(*before), strict=False):
            new[:held] = old

    def _take(self, rows: Tensor) -> None:
        if not self.batch_size:
            return
        chosen, rows = rows.tolist(), rows.to(self.layout.device)
        self._pads_host = tuple(self._pads_host[r] for r in chosen)
        self._pages.take(chosen, [self.seen - p for p in self._pads_host])
        self._pads = self._pads.index_select(0, rows)
        self._real = None if self._real is None else self._real.index_select(0, rows)
        self._ready = 0
        self._table()
