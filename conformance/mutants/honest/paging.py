"""Rows of paged caches, found and decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from glm5_hal.conformance.mutants.honest.calls import Args
from glm5_hal.formats import FORMATS


@dataclass(frozen=True)
class Reading:
    """How rows of a paged cache are found and decoded; the defaults are right."""

    slot: Callable[[Tensor, Tensor, int], Tensor] = lambda pages, at, page: pages[at // page].long() * page + at % page
    fields: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda fields: fields
    block_major: bool | None = None
    codes: Callable[[Tensor], Tensor] = lambda codes: codes.view(torch.float8_e4m3fn).float()
    scale: Callable[[Tensor], Tensor] = lambda scale: scale
    rope: Callable[[Tensor], Tensor] = lambda rope: rope


RIGHT = Reading()


def read(cache_format: str, held: list[Tensor], slots: Tensor, latent: int, how: Reading = RIGHT) -> Tensor:
    """Rows [n, width] in fp32: latent (or index key), then the rope dims if there are any."""
    fmt = FORMATS[cache_format]
    page, at = slots // held[0].shape[1], slots % held[0].shape[1]
    if not fmt.group:
        return torch.cat([cache[page, at].float() for cache in held], -1)
    groups = latent // fmt.group
    widths = {"latent": latent, "scale": 4 * groups}
    widths["rope"] = held[0].shape[-1] - sum(widths.values())
    part, start = {}, 0
    major = fmt.block_major if how.block_major is None else how.block_major
    for name in how.fields(fmt.fields):
        width = widths[name]
        if major:
            whole = held[0].flatten(1)
            found = [whole[p, start + i * width :][:width] for p, i in zip(page.tolist(), at.tolist(), strict=True)]
            part[name] = torch.stack(found) if found else held[0].new_zeros(0, width)
            start += width * held[0].shape[1]
        else:
            part[name] = held[0][page, at, start : start + width].contiguous()
            start += width
    values = how.codes(part["latent"]).reshape(len(slots), groups, fmt.group)
    rows = (values * how.scale(part["scale"].view(torch.float32))[..., None]).reshape(len(slots), latent)
    return torch.cat([rows, how.rope(part["rope"].view(torch.bfloat16).float())], -1) if "rope" in part else rows


def held_of(a: Args) -> list[Tensor]:
    return [a.kv_cache] if a.rope_cache is None else [a.kv_cache, a.rope_cache]


def requests(a: Args) -> Iterator[tuple[int, int, int, int]]:
    """(request, first token, one past its last, cached keys)."""
    for r, (start, stop) in enumerate(pairwise(a.cu_seqlens_q.tolist())):
        yield r, start, stop, int(a.seq_lens[r])
