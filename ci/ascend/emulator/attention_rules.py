"""What the pages of npu_fused_infer_attention_score and its second version constrain.

Where the two differ: the first one's page forbids softmax_lse with query D = 512, the second one's does not; the first
one's table gives N before B for no output layout, the second one's and the op's shape inference give [N, B, S, D] for
…_NBSD, which is taken. Both bound the ratio of heads by 64 and allow 128 heads over one with D = 512: the bound is for
other D. Layouts that the MLA constraints name and the layout table does not (NTD, BSH_BNSD, BSND_BNSD) are allowed
there only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .constraints import Rules
from .norms import HALF

#: input_layout → layouts of query and output.
LAYOUTS = {
    "BSH": ("BSH", "BSH"),
    "BSND": ("BSND", "BSND"),
    "BNSD": ("BNSD", "BNSD"),
    "BNSD_BSND": ("BNSD", "BSND"),
    "BSH_BNSD": ("BSH", "BNSD"),
    "BSND_BNSD": ("BSND", "BNSD"),
    "BSH_NBSD": ("BSH", "NBSD"),
    "BSND_NBSD": ("BSND", "NBSD"),
    "BNSD_NBSD": ("BNSD", "NBSD"),
    "TND": ("TND", "TND"),
    "NTD": ("NTD", "NTD"),
    "TND_NTD": ("TND", "NTD"),
    "NTD_TND": ("NTD", "TND"),
}
ROPE_ONLY = ("BSH_BNSD", "BSND_BNSD")
WIDE_ROPE = ("BSH", "BSND", "BNSD", "BNSD_NBSD", "BSND_NBSD", "BSH_NBSD", "TND", "TND_NTD")
NARROW_ROPE = ("BSH", "BSND", "TND", "BNSD", "NTD", "BSH_BNSD", "BSND_BNSD", "BNSD_BSND", "NTD_TND")
TOKENS = ("TND", "NTD")
HEADS_512 = (1, 2, 4, 8, 16, 32, 64, 128)
MASK = 2048
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Attention:
    """One call, in the words of either version."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_rope: Tensor | None
    key_rope: Tensor | None
    mask: Tensor | None
    query_lengths: Sequence[int] | None
    key_lengths: Sequence[int] | None
    block_table: Tensor | None
    sink: Tensor | None
    heads: int
    key_heads: int
    scale: float
    pre_tokens: int
    next_tokens: int
    layout: str
    sparse_mode: int
    block_size: int
    inner_precise: int
    lse: bool

    @property
    def layouts(self) -> tuple[str, str]:
        return LAYOUTS[self.layout]

    @property
    def tokens(self) -> bool:
        return self.layouts[0] in TOKENS

    @property
    def width(self) -> int:
        """D of query."""
        return self.query.shape[-1] // (self.heads if self.layouts[0] == "BSH" else 1)

    @property
    def batch(self) -> int:
        if self.tokens:
            return len(self.query_lengths or ())
        return self.query.shape[0]

    @property
    def query_rows(self) -> int:
        """S of query, or the longest of its requests."""
        if self.tokens:
            ends = list(self.query_lengths or ())
            return max((b - a for a, b in zip([0, *ends], ends, strict=False)), default=0)
        return self.query.shape[2 if self.layouts[0] == "BNSD" else 1]


def check(rules: Rules, call: Attention) -> None:
    rules.one_of("input_layout", call.layout, LAYOUTS)
    rules.need(call.heads > 0, "the number of query heads is above 0", call.heads)
    rules.need(call.heads % call.key_heads == 0, "key heads divide query heads", (call.heads, call.key_heads))
    rules.need(call.heads <= 256 and call.key_heads <= 256, "there are at most 256 heads", (call.heads, call.key_heads))
    both = (call.query_rope is None) == (call.key_rope is None)
    rules.need(both, "query_rope and key_rope are given together", (call.query_rope is None, call.key_rope is None))
    rules.beyond(any(t.dtype not in HALF for t in (call.query, call.key, call.value)), "quantised queries and keys")
    names = ("query", "key", "value", "query_rope", "key_rope")
    inputs = {name: getattr(call, name) for name in names}
    rules.same_dtype(**inputs)
    rules.contiguous(**inputs, atten_mask=call.mask)
    query_layout = call.layouts[0]
    rules.dims("query", call.query, 4 if query_layout in ("BSND", "BNSD") else 3)
    axis = {"BSND": 2, "BNSD": 1, "TND": 1, "NTD": 0}.get(query_layout)
    if axis is None:
        rules.need(call.query.shape[-1] % call.heads == 0, "the number of heads divides H", call.query)
    else:
        rules.need(call.query.shape[axis] == call.heads, f"query has {call.heads} heads", call.query)
    rules.need(call.width <= 512 and call.width % 16 == 0, "D is a multiple of 16, at most 512", call.width)
    _lengths(rules, call)
    rules.need(call.batch <= 65536, "B is at most 65536", call.batch)
    rows = call.query_rows
    rules.one_of("inner_precise", call.inner_precise, range(4) if rows > 1 else range(2))
    if call.layouts[1] == "NBSD":
        rules.need(1 < rows <= 16, "S of query is within (1, 16] for an output NBSD", rows)
    if call.layout == "BNSD_BSND":
        rules.need(rows > 1, "S of query is above 1 for BNSD_BSND", rows)
    if call.query_rope is not None:
        _rope(rules, call)
    else:
        _plain(rules, call)
    if call.block_table is not None:
        _paged(rules, call)
    _sink(rules, call)
    _sparse(rules, call)


def _lengths(rules: Rules, call: Attention) -> None:
    names = {"query lengths": call.query_lengths, "key lengths": call.key_lengths}
    if call.tokens:
        rules.given(
            f"input_layout is {call.layout}", **{name.replace(" ", "_"): value for name, value in names.items()}
        )
        assert call.query_lengths is not None
        assert call.key_lengths is not None
        rules.need(1 <= call.batch <= 4096, "there are 1 to 4096 requests", call.batch)
        need = "query and key lengths have an element for each request"
        rules.need(len(call.key_lengths) == call.batch, need, (call.batch, len(call.key_lengths)))
        rules.need(min(call.key_lengths) >= 0, "key lengths are not negative", list(call.key_lengths))
        rows = call.query.shape[0 if call.layouts[0] == "TND" else 1]
        _prefix(rules, "query lengths", call.query_lengths, rows)
        return
    for name, given in names.items():
        if given is not None:
            fits = len(given) == 1 or len(given) >= call.batch
            rules.need(fits, f"{name} have 1 element or at least {call.batch}", list(given))
            rules.need(all(length >= 0 for length in given), f"{name} are not negative", list(given))
    if call.query_lengths is not None and call.query_rows > 1:
        short = all(length <= call.query_rows for length in call.query_lengths[: call.batch])
        rules.need(short, f"query lengths are at most {call.query_rows}", list(call.query_lengths))


def _prefix(rules: Rules, name: str, ends: Sequence[int], rows: int) -> None:
    rising = all(a <= b for a, b in zip([0, *ends], ends, strict=False))
    rules.need(rising, f"{name} are prefix sums, none below 0 or its predecessor", list(ends))
    rules.need(ends[-1] == rows, f"{name} end at T = {rows}", list(ends))


def check_unpaged_lengths(rules: Rules, call: Attention, rows: int) -> None:
    """Keys that are not paged: prefix sums over T, or lengths within S."""
    if call.key_lengths is None:
        return
    if call.tokens:
        _prefix(rules, "key lengths", call.key_lengths, rows)
    else:
        short = all(length <= rows for length in call.key_lengths[: call.batch])
        rules.need(short, f"key lengths are at most {rows}", list(call.key_lengths))


def _rope(rules: Rules, call: Attention) -> None:
    assert call.query_rope is not None
    assert call.key_rope is not None
    rules.one_of("D of query beside query_rope", call.width, (512, 128))
    wide = call.width == 512
    rules.one_of("input_layout", call.layout, WIDE_ROPE if wide else NARROW_ROPE)
    columns = 64 * (call.heads if call.layouts[0] == "BSH" else 1)
    rules.shape("query_rope", call.query_rope, *call.query.shape[:-1], columns)
    if wide:
        rules.one_of("N of query with D 512", call.heads, HEADS_512)
        rules.need(call.key_heads == 1, "N of key is 1 with D 512", call.key_heads)
        rules.one_of("sparse_mode with D 512", call.sparse_mode, (0, 3, 4, 9))
        rules.not_empty(query=call.query, key=call.key)
        first = rules.op == "npu_fused_infer_attention_score"
        rules.need(not (first and call.lse), "softmax_lse_flag is False with D 512", call.lse)
    rules.need(call.value.shape == call.key.shape, "value has key's shape", [call.key, call.value])


def _plain(rules: Rules, call: Attention) -> None:
    rules.need(call.layout not in ROPE_ONLY, f"{call.layout} is for calls with query_rope", call.layout)
    rules.need(call.heads // call.key_heads <= 64, "there are at most 64 query heads over one key head", call.heads)
    if not call.tokens:
        rules.need(call.value.shape == call.key.shape, "value has key's shape", [call.key, call.value])
        return
    rules.need(call.layout != "TND_NTD", "TND_NTD is for D 512 with query_rope", call.layout)
    many = call.heads == call.key_heads
    widths: tuple[int, ...] = (call.width, call.key.shape[-1], call.value.shape[-1])
    if call.block_table is not None and call.key.dim() == 3:
        widths = (call.width, *(t.shape[-1] // call.key_heads for t in (call.key, call.value)))
    allowed = [(128, 128, 128), (192, 192, 128)]
    if call.layout == "TND" and not (call.block_table is not None or not many):
        allowed.append((192, 192, 192))
    if call.layout == "TND" and many:
        allowed.append((64, 64, 64))
    rules.need(widths in allowed, f"D of query, key and value is one of {allowed}", widths)
    if many:
        precise = (0, 1) if call.query.dtype is torch.float16 else (0,)
        rules.one_of("inner_precise where every query head has its key head", call.inner_precise, precise)
        paged = call.block_table is not None and call.key.dim() != 3
        rules.need(not paged, "pages are [blocks, block_size, H] where every query head has its key head", call.key)


def _paged(rules: Rules, call: Attention) -> None:
    assert call.block_table is not None
    table, size, key = call.block_table, call.block_size, call.key
    rules.given("keys are paged", key_lengths=call.key_lengths)
    assert call.key_lengths is not None
    rules.dtype("block_table", table, torch.int32)
    rules.dims("block_table", table, 2)
    rules.need(table.shape[0] == call.batch, f"block_table has a row for each of {call.batch} requests", table)
    if call.tokens or call.query_rope is not None:
        held = size % 16 == 0 and 16 <= size <= 1024
        rules.need(held, "block_size is a multiple of 16, at most 1024", size)
    elif call.query_rows > 1:
        rules.need(size % 128 == 0 and 128 <= size <= 512, "block_size is 128, 256, 384 or 512", size)
    else:
        rules.need(size % 16 == 0 and 16 <= size <= 512, "block_size is a multiple of 16, at most 512", size)
    rules.dims("key", key, 3, 5)
    if key.dim() == 5:
        rules.need(
            call.query_rope is not None and call.width == 512, "pages in FRACTAL_NZ are for D 512 with rope", key
        )
    for name, pages, width in _pages(call):
        _page_shape(rules, call, name, pages, width)
    if key.dim() == 4:
        allowed = call.layouts[0] in ("BNSD", "TND", "NTD")
        rules.need(allowed, "pages [blocks, N, block_size, D] are for queries BNSD and TND", call.layout)
    if key.dim() == 3:
        rules.need(key.shape[-1] <= 65535, "H of a page is at most 65535", key)
    lengths = page_lengths(call)
    need = [-(-length // size) for length in lengths]
    rules.need(max(need) <= table.shape[1], f"block_table has at least {max(need)} columns", table)
    rules.need(sum(need) <= len(key), f"key has at least {sum(need)} blocks, those of all requests", key)
    used = torch.arange(table.shape[1]) < torch.tensor(need)[:, None]
    ids = table[used]
    rules.need(
        bool(((ids >= 0) & (ids < len(key))).all()), f"block ids in use are within [0, {len(key)})", ids.tolist()
    )


def _pages(call: Attention) -> list[tuple[str, Tensor, int]]:
    pages = [("key", call.key, call.width), ("value", call.value, call.width)]
    if call.query_rope is None and call.tokens:
        last = call.value.shape[-1] // (call.key_heads if call.value.dim() == 3 else 1)
        pages[1] = ("value", call.value, last)
    return pages if call.key_rope is None else [*pages, ("key_rope", call.key_rope, 64)]


def _page_shape(rules: Rules, call: Attention, name: str, pages: Tensor, width: int) -> None:
    blocks, size, heads = len(call.key), call.block_size, call.key_heads
    shapes = {
        3: (blocks, size, heads * width),
        4: (blocks, heads, size, width),
        5: (blocks, heads, width // 16, size, 16),
    }
    rules.shape(name, pages, *shapes[call.key.dim()])


def page_lengths(call: Attention) -> list[int]:
    """With pages, key lengths are each request's own, also where queries are TND."""
    assert call.key_lengths is not None
    given = list(call.key_lengths)
    return given * call.batch if len(given) == 1 else given[: call.batch]


def _sink(rules: Rules, call: Attention) -> None:
    if call.sink is None:
        return
    rules.one_of("input_layout beside learnable_sink", call.layout, ("TND", "NTD_TND"))
    rules.dtype("learnable_sink", call.sink, torch.bfloat16)
    rules.shape("learnable_sink", call.sink, call.heads)
    rules.need(call.value.shape[-1] <= 128, "D of value is at most 128 beside learnable_sink", call.value)


def _sparse(rules: Rules, call: Attention) -> None:
    mode, mask = call.sparse_mode, call.mask
    rules.one_of("sparse_mode", mode, (0, 1, 2, 3, 4, 9))
    rules.need(mode != 9 or call.query_rope is not None, "sparse_mode 9 is for calls with query_rope", mode)
    ignored = call.query_rows == 1 and call.query_rope is None and not call.tokens
    rules.beyond(mode in (4, 9) and not ignored, f"sparse_mode {mode}")
    if mask is not None:
        rules.dtype("atten_mask", mask, torch.bool, torch.int8, torch.uint8)
    if mode in (2, 3) and not ignored:
        if call.tokens:
            rules.need(mode == 3, "sparse_mode is 0, 3 or 4 for TND", mode)
        rules.given(f"sparse_mode is {mode}", atten_mask=mask)
        assert mask is not None
        shapes = [(MASK, MASK), (1, MASK, MASK), (1, 1, MASK, MASK)]
        rules.need(tuple(mask.shape) in shapes, f"atten_mask has one of the shapes {shapes}", mask)
        causal = torch.equal(mask.view(MASK, MASK) != 0, torch.ones(MASK, MASK, dtype=torch.bool).triu(1))
        rules.need(causal, "atten_mask leaves the lower triangle visible and hides the rest", mask)
        return
    rules.need(mode != 1 or mask is not None, "atten_mask is given with sparse_mode 1", mask)
    if mask is None:
        return
    rules.need(not call.tokens, "atten_mask is None with sparse_mode 0 for TND", mask)
    bounded = mode == 0 and call.query_rows > 1 and min(call.pre_tokens, call.next_tokens) < 65535
    rules.beyond(bounded, "pre_tokens and next_tokens beside an atten_mask")
