"""Which pages each row of a batch owns. Host integers only: the tensors are the cache's business."""

from __future__ import annotations

from collections.abc import Sequence


class Pages:
    """Page numbers by row. Rows that were copied from one row share its pages until one of them writes.

    Attributes:
        size: tokens per page.
        tables: each row's pages, in the order of its tokens.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.tables: list[list[int]] = []
        self._owners: list[int] = []
        self._free: list[int] = []

    @property
    def count(self) -> int:
        """How many pages have ever been in use: the pool needs as many."""
        return len(self._owners)

    @property
    def shared(self) -> bool:
        return any(owners > 1 for owners in self._owners)

    def claim(self, lengths: Sequence[int], wanted: Sequence[int]) -> tuple[list[tuple[int, int]], bool]:
        """Give every row pages of its own for the tokens from ``lengths[r]`` to ``wanted[r]``.

        Returns:
            (source, target) of the pages whose contents must be copied before anything is written, and whether any
            table changed.
        """
        copies, changed = [], False
        for table, length, stop in zip(self.tables, lengths, wanted, strict=True):
            for i in range(length // self.size, -(-stop // self.size)):
                if i < len(table) and self._owners[table[i]] == 1:
                    continue
                page, changed = self._new(), True
                if i == len(table):
                    table.append(page)
                    continue
                if i * self.size < length:
                    copies.append((table[i], page))
                self._owners[table[i]] -= 1
                table[i] = page
        return copies, changed

    def take(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """The batch becomes copies of these rows, each with no more pages than its ``lengths`` tokens fill."""
        before = self.tables
        self.tables = [before[r][: -(-n // self.size)] for r, n in zip(rows, lengths, strict=True)]
        for table in self.tables:
            for page in table:
                self._owners[page] += 1
        for table in before:
            for page in table:
                self._owners[page] -= 1
                if not self._owners[page]:
                    self._free.append(page)

    def _new(self) -> int:
        if self._free:
            page = self._free.pop()
            self._owners[page] = 1
            return page
        self._owners.append(1)
        return len(self._owners) - 1
