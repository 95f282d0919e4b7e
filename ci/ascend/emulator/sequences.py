"""Requests in the layouts BSND, TND and PA_BSND, which the indexers and the sparse attentions share.

T is the sum of all requests' lengths, as the pages define it: the last prefix sum of TND is T. Assumed where the
documents are silent: query rows past a request's length (BSND) are padding; a request whose queries outnumber its keys
has rows that see no key; block ids are looked at only where a request has keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .constraints import Rules

QUERY_LAYOUTS = ("BSND", "TND")
KEY_LAYOUTS = ("PA_BSND", "BSND", "TND")
I64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Queries:
    """Which request every query row belongs to, and where in it. Rows are those of the query flattened to [rows, …]."""

    row: Tensor
    request: Tensor
    offset: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Keys:
    """Where a request's positions lie in the keys flattened to [rows, …]."""

    lengths: Tensor
    start: Tensor | None
    block_table: Tensor | None
    block_size: int

    def rows(self, request: Tensor, position: Tensor) -> Tensor:
        if self.block_table is None:
            assert self.start is not None
            return self.start[request] + position
        block = self.block_table[request, position // self.block_size].long()
        return block * self.block_size + position % self.block_size


def flat(tensor: Tensor, layout: str) -> Tensor:
    return tensor.flatten(0, 1) if layout != "TND" else tensor


def check_layouts(rules: Rules, query: Tensor, key: Tensor, layout_query: str, layout_key: str, names: str) -> None:
    rules.one_of("layout_query", layout_query, QUERY_LAYOUTS)
    rules.one_of(names, layout_key, KEY_LAYOUTS)
    same = layout_key in ("PA_BSND", layout_query)
    rules.need(same, f"{names} is layout_query where keys are not paged", (layout_query, layout_key))
    rules.dims("query", query, 4 if layout_query == "BSND" else 3)
    rules.dims("key", key, 3 if layout_key == "TND" else 4)
    rules.not_empty(query=query, key=key)
    rules.need(key.shape[-2] == 1, "N of key is 1", key)
    if layout_key == "BSND":
        rules.need(key.shape[0] == query.shape[0], "B of key is that of query", [query, key])
    if layout_key == "PA_BSND":
        _block_size(rules, key.shape[1])


def check_tokens(rules: Rules, pre_tokens: int, next_tokens: int, sparse_mode: int) -> None:
    rules.one_of("sparse_mode", sparse_mode, (0, 3))
    rules.need(pre_tokens == I64_MAX, "pre_tokens has its default 2**63-1", pre_tokens)
    rules.need(next_tokens == I64_MAX, "next_tokens has its default 2**63-1", next_tokens)


def _block_size(rules: Rules, size: int) -> None:
    rules.need(size % 16 == 0 and 16 <= size <= 1024, "block_size is a multiple of 16, at most 1024", size)


def queries(rules: Rules, query: Tensor, layout: str, actual: Tensor | None) -> Queries:
    name = "actual_seq_lengths_query"
    if layout == "TND":
        rules.given("layout_query is TND", **{name: actual})
        assert actual is not None
        ends = _prefix_sums(rules, name, actual, query.shape[0])
        lengths = ends.diff(prepend=ends.new_zeros(1))
        starts = ends - lengths
    else:
        batch, width = query.shape[:2]
        lengths = _lengths(rules, name, actual, batch, width)
        starts = torch.arange(batch) * width
    request = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    offset = torch.arange(len(request)) - (lengths.cumsum(0) - lengths)[request]
    return Queries(starts[request] + offset, request, offset, lengths)


def keys(
    rules: Rules, key: Tensor, layout: str, actual: Tensor | None, table: Tensor | None, batch: int, names: str
) -> Keys:
    if layout == "TND":
        rules.given("keys are TND", **{names: actual})
        assert actual is not None
        ends = _prefix_sums(rules, names, actual, key.shape[0])
        rules.need(len(ends) == batch, f"{names} has one element for each of {batch} requests", actual)
        lengths = ends.diff(prepend=ends.new_zeros(1))
        return Keys(lengths, ends - lengths, None, 0)
    if layout == "BSND":
        width = key.shape[1]
        lengths = _lengths(rules, names, actual, batch, width)
        return Keys(lengths, torch.arange(batch) * width, None, 0)
    rules.given("keys are paged", **{names: actual, "block_table": table})
    assert table is not None
    rules.dtype("block_table", table, torch.int32)
    rules.dims("block_table", table, 2)
    rules.need(table.shape[0] == batch, f"block_table has one row for each of {batch} requests", table)
    blocks, size = key.shape[:2]
    lengths = _lengths(rules, names, actual, batch, table.shape[1] * size)
    used = torch.arange(table.shape[1]) * size < lengths[:, None]
    ids = table[used]
    rules.need(
        bool(((ids >= 0) & (ids < blocks)).all()), f"the block ids in use are within [0, {blocks})", ids.tolist()
    )
    return Keys(lengths, None, table, size)


def _ints(rules: Rules, name: str, values: Tensor) -> Tensor:
    rules.dtype(name, values, torch.int32)
    rules.dims(name, values, 1)
    return values.long()


def _lengths(rules: Rules, name: str, actual: Tensor | None, batch: int, width: int) -> Tensor:
    if actual is None:
        return torch.full((batch,), width)
    lengths = _ints(rules, name, actual)
    rules.need(len(lengths) == batch, f"{name} has one element for each of {batch} requests", actual)
    rules.need(bool(((lengths >= 0) & (lengths <= width)).all()), f"{name} are within [0, {width}]", actual.tolist())
    return lengths


def _prefix_sums(rules: Rules, name: str, actual: Tensor, rows: int) -> Tensor:
    ends = _ints(rules, name, actual)
    rules.need(len(ends) > 0, f"{name} has an element for each request", actual)
    rising = bool((ends.diff(prepend=ends.new_zeros(1)) >= 0).all())
    rules.need(rising, f"{name} are prefix sums, none below 0 or its predecessor", actual.tolist())
    rules.need(int(ends[-1]) == rows, f"{name} end at T = {rows}", actual.tolist())
    return ends
