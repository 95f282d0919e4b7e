"""Which pages each row of a batch owns. Host integers only: the tensors are the cache's business."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count


@dataclass(frozen=True)
class Claim:
    """What rows will own, if all that it takes can be had.

    Attributes:
        tables: each row's pages then.
        copies: (source, target) of the pages whose contents must be copied before anything is written.
        pool: how many pages there must be.
        taken: pages that get an owner.
        left: pages that lose owners, and how many.
    """

    tables: list[list[int]]
    copies: list[tuple[int, int]]
    pool: int
    taken: list[int]
    left: Counter[int]


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
        """How many pages have ever been in use."""
        return len(self._owners)

    @property
    def shared(self) -> bool:
        return any(owners > 1 for owners in self._owners)

    def claim(self, lengths: Sequence[int], wanted: Sequence[int]) -> Claim:
        """Pages of its own for every row's tokens from ``lengths[r]`` to ``wanted[r]``. Nothing changes until `commit`:
        memory may run out before."""
        tables, copies, taken, left = list(self.tables), [], [], Counter[int]()
        spare = chain(reversed(self._free), count(self.count))
        for r, (length, stop) in enumerate(zip(lengths, wanted, strict=True)):
            for i in range(length // self.size, -(-stop // self.size)):
                table = tables[r]
                if i < len(table) and self._owners[table[i]] - left[table[i]] == 1:
                    continue
                page = next(spare)
                taken.append(page)
                if table is self.tables[r]:
                    table = tables[r] = list(table)
                if i == len(table):
                    table.append(page)
                    continue
                if i * self.size < length:
                    copies.append((table[i], page))
                left[table[i]] += 1
                table[i] = page
        return Claim(tables, copies, max([self.count, *(page + 1 for page in taken)]), taken, left)

    def commit(self, claim: Claim) -> None:
        """The rows own what the latest claim says."""
        self.tables = claim.tables
        self._owners += [0] * (claim.pool - self.count)
        for page in claim.taken:
            self._owners[page] = 1
        for page, owners in claim.left.items():
            self._owners[page] -= owners
        del self._free[max(len(self._free) - len(claim.taken), 0) :]

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
