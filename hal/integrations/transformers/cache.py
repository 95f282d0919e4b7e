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
from glm5_hal.integrations.transformers.padding import Padding
from glm5_hal.integrations.transformers.pages import Pages
from glm5_hal.integrations.transformers.step import Step, decode_slots, offsets
from glm5_hal.plan import StepPlan


class PagedCache(Cache):  # type: ignore[misc] # transformers has no types
    """A paged cache of MLA latents and index keys for a model that `apply` was called on.

    Grows as it is used. Compiled code cannot grow it: give ``batch_size`` and ``max_length``, or call `reserve`, first.

    Args:
        model: the model, its inner decoder, or the layout of a cache for something else.
        batch_size, max_length: rows and tokens per row to reserve room for; 0 leaves both open.
        keep: whether what is written is needed after the pass; if not, one layer's memory serves all.

    Attributes:
        seen: columns of the batch that have passed, padding included.
        latent: each layer's tensors of the latent format, ``[N, P, width]``; none before there is a page.
        index: each layer's index keys, ``[N, P, width]``; None where a layer has no indexer.
        block_table: ``[B, M]`` int32.
    """

    def __init__(self, model: Any, *, batch_size: int = 0, max_length: int = 0, keep: bool = True) -> None:
        from glm5_hal.integrations.transformers.models import applied

        super().__init__(layers=[])
        self.layout: memory.Layout = model if isinstance(model, memory.Layout) else applied(model).layout
        self.latent: list[tuple[Tensor, ...]] = [()] * len(self.layout.indexed)
        self.index: list[Tensor | None] = [None] * len(self.layout.indexed)
        self._keep = keep
        self.seen = 0
        self._pages = Pages(self.layout.page_size)
        self._padding = Padding(self.layout.device)
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
        if not self.batch_size:
            self._begin(batch)
        if batch != self.batch_size:
            refuse(
                "SHAPE",
                f"the cache holds {self.batch_size} rows, this pass has {batch}",
                value=batch,
                fix="give every batch a cache of its own, or reset() this one",
            )
        real = self._padding.new(self.seen, columns, mask)
        before, held = self.seen - self._padding.counts, self._padding.tokens(self.seen)  # in the cache, [B]
        end, longest = self.seen + columns, max(held) + columns
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
            longest = max(n + k for n, k in zip(held, counts, strict=True))
        slots = decode_slots(self.block_table.long(), positions, self.layout.page_size)
        plan = None
        if not compiling:
            host = [n + k for n, k in zip(held, counts, strict=True)]
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
            self._padding.extend(self.seen, step.real)
        self.seen = self.seen + step.columns

    def reserve(self, max_length: int, *, batch_size: int = 0) -> None:
        """Room for ``max_length`` columns of every row, so that no later pass changes a tensor's shape until then.

        Raises:
            HalError: SHAPE for another number of rows than the cache holds, or where it holds none and none is given.
        """
        if not (batch_size or self.batch_size):
            refuse(
                "SHAPE",
                "the cache holds no rows yet, so there is no telling how much to reserve",
                value=batch_size,
                fix=f"say how many there will be: reserve({max_length}, batch_size=...)",
            )
        if not self.batch_size:
            self._begin(batch_size)
        if batch_size not in (0, self.batch_size):
            refuse(
                "SHAPE",
                f"the cache holds {self.batch_size} rows, not {batch_size}",
                value=batch_size,
                fix="reset() it, or leave batch_size out",
            )
        self._claim([max_length - n for n in self._padding.tokens(self.seen)])
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
        self._padding = Padding(self.layout.device)

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
        self._padding.crop(kept)
        self.seen = kept
        if self._pages.shared:  # it may reach back into a page that another row reads
            self._ready = 0

    def crop_rows(self, lengths: Tensor) -> None:
        """Keep each row's first ``lengths [B]`` tokens. Its columns are then those of a batch padded on the left."""
        kept, held = lengths.tolist(), self._padding.tokens(self.seen)
        if len(kept) != len(held) or not all(0 <= n <= h for n, h in zip(kept, held, strict=True)):
            refuse(
                "VALUE",
                f"crop_rows({kept}): the rows hold {held} tokens",
                value=kept,
                fix="give every row a length between 0 and what it holds",
            )
        self.seen = max(kept, default=0)
        self._padding.left(kept)
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
        return self._padding.mask(self.seen)

    @property
    def batch_size(self) -> int:
        return len(self._padding.rows)

    @property
    def is_initialized(self) -> bool:
        return any(self.latent)

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """No: that word makes `generate` build 4D masks. `torch.compile` of a model with this cache works."""
        return False

    # --- rows and pages ----------------------------------------------------------------------------------------------

    def _begin(self, batch: int) -> None:
        self._ready = 0
        self._padding.begin(batch)
        self._pages.tables = [[] for _ in range(batch)]
        self.block_table = self._table(self._pages.tables)

    def _claim(self, new: Sequence[int]) -> None:
        """Pages for ``new[r]`` more tokens of each row. The rows own them last: until then memory may run out."""
        lengths = self._padding.tokens(self.seen)
        claim = self._pages.claim(lengths, [n + k for n, k in zip(lengths, new, strict=True)])
        if not claim.taken:
            return
        memory.grow(self.layout, self.latent, self.index, claim.pool, keep=self._keep)
        if claim.copies:
            source, target = (torch.tensor(p, device=self.layout.device) for p in zip(*claim.copies, strict=True))
            for tensor in memory.tensors(self.latent, self.index):
                tensor[target] = tensor[source]
        self.block_table = self._table(claim.tables)
        self._pages.commit(claim)

    def _table(self, tables: Sequence[Sequence[int]]) -> Tensor:
        """The block table as a tensor. Its width is a power of two: calls of a new shape are resolved anew."""
        width = 1 << (max(map(len, tables), default=1) - 1).bit_length()
        rows = [[*table, *[0] * (width - len(table))] for table in tables]
        with torch.inference_mode(False):
            return torch.tensor(rows, dtype=torch.int32, device=self.layout.device)

    def _take(self, rows: Tensor) -> None:
        if not self.batch_size:
            return
        chosen = rows.tolist()
        self._padding.take(chosen)
        self._pages.take(chosen, self._padding.tokens(self.seen))
        self._ready = 0
        self.block_table = self._table(self._pages.tables)
