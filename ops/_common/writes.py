"""What the cache writers share: their arguments and errors, and sample rows that make every rounding show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import CacheFormat
from glm5_hal.ops._common.batches import as_args
from glm5_hal.ops._common.caches import E4M3_NAN, grouped
from glm5_hal.spec import Arg, BadInput, Draw

SLOTS = Arg("slot_mapping", "T", "int64", "flat slot of each token, block · page_size + offset; -1 skips the token")


def slots(draw: Draw, tokens: int, total: int, *, skipped: str = "some") -> Tensor:
    """Different slots in no order; -1 for "some" tokens (every fifth), the "first" 16, "all" (there may be no slot
    then) or "none"."""
    chosen: Tensor = draw.permutation(max(total, tokens))[:tokens]
    places = {"some": slice(3, None, 5), "first": slice(16), "all": slice(None), "none": slice(0, 0)}
    chosen[places[skipped]] = -1
    return chosen


def held(draw: Draw, fmt: CacheFormat, blocks: int, page: int, dims: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """The format's tensors, full of what an earlier write may have left, under their arguments' names."""
    tensors = fmt.allocate(blocks, page, *dims, dtype=getattr(torch, dtype))
    return as_args(fmt, tuple(draw.integers(-100, 100, *t.shape).to(t.dtype) for t in tensors))


def rows(draw: Draw, tokens: int, width: int, dtype: str, *, group: int = 0) -> Tensor:
    """Numbers with more bits than bfloat16 keeps (where the dtype has them); groups differ in size by powers of two."""
    x = draw.normal(tokens, width, dtype=dtype)
    if not group:
        return x
    sizes: Tensor = 2.0 ** draw.integers(-12, 10, tokens, width // group)
    return (grouped(x, group) * sizes.to(x.dtype)[..., None]).flatten(-2)


def quantiser_edges(width: int, group: int, dtype: str) -> Tensor:
    """Rows whose groups hold, in turn, every special case of e4m3 quantisation in groups of 128."""
    kind = getattr(torch, dtype)
    eps, largest, smallest = torch.finfo(kind).eps, torch.finfo(kind).max, torch.finfo(kind).tiny
    codes = torch.arange(E4M3_NAN, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 and all 126 positive ones
    halfway = torch.cat([torch.tensor([448.0]), (codes[1:] + codes[:-1]) / 2, torch.zeros(1)]).double()
    sign = torch.tensor([1.0, -1.0, -1.0]).repeat(group)[:group]
    ramp = torch.arange(group) / group
    patterns = [
        torch.zeros(group),
        torch.full((group,), -0.0),
        sign * halfway,  # ties go to the even code
        sign * halfway * torch.where(halfway < 448, 1 + eps, 1.0),  # a bit more or less than halfway
        sign * halfway * torch.where(halfway < 448, 1 - eps, 1.0),
        sign * ramp.where(ramp > 0, 448 * (1 + eps)),  # the scale's next power of two
        sign * ramp.where(ramp > 0, 448 * (1 - eps)),
        sign * ramp * 2.0**-17,  # below either floor, or below that on the scale
        sign * ramp * 2.0**-6,
        sign * ramp * smallest,
        sign * ramp.where(ramp > 0, 1.0) * largest,
    ]
    stack = torch.stack([p.double() for p in patterns])
    turned = [stack.roll(shift, 0) for shift in range(width // group)]
    return torch.cat(turned, -1).to(kind)


def broken_groups(x: Tensor, group: int) -> Tensor:
    """The rows with a NaN or an infinity in one group of each of the first ones."""
    x = x.clone()
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[row, (row * group + 5) % x.shape[-1]] = value
    return x


def slot_errors(cache: str) -> tuple[BadInput, ...]:
    def too_large(args: dict[str, Any]) -> dict[str, Any]:
        blocks, page = args[cache].shape[:2]
        return {**args, "slot_mapping": torch.full_like(args["slot_mapping"], blocks * page)}

    return (
        BadInput("slot_too_large", "VALUE", too_large),
        BadInput("slot_negative", "VALUE", lambda args: {**args, "slot_mapping": args["slot_mapping"] * 0 - 2}),
        BadInput("cache_dtype", "DTYPE", lambda args: {**args, cache: args[cache].to(torch.float64)}),
        BadInput("cache_width", "SHAPE", lambda args: {**args, cache: args[cache][..., 1:].contiguous()}),
        BadInput("cache_format_unknown", "SCALAR", lambda args: {**args, "cache_format": "bytes"}),
    )
