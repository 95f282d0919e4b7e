"""A paged call with no other pages than those that it touches: small enough to be kept, and the same call otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.spec import OpSpec


def compact(spec: OpSpec, args: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """The arguments over caches of the touched pages alone, and which pages those are (None: the op has no cache).

    Reads lengths and tables, so it syncs a device.
    """
    made = dict(args)
    paged = [a.name for a in spec.args if a.layout == "page" and args[a.name] is not None]
    if not paged:
        return made, None
    num_blocks, page = args[paged[0]].shape[:2]
    if "block_table" in spec.tensors:
        table = args["block_table"]
        starts = torch.arange(table.shape[1], device=table.device) * page
        used = starts < args["seq_lens"][:, None]
        pages, places = torch.unique(table[used].long(), return_inverse=True)
        made["block_table"] = torch.zeros_like(table).masked_scatter_(used, places.to(table.dtype))
    else:
        slots = args["slot_mapping"]
        written = slots >= 0
        pages, places = torch.unique(slots[written] // page, return_inverse=True)
        inside = places * page + slots[written] % page
        made["slot_mapping"] = slots.clone().masked_scatter_(written, inside)
    if not len(pages) and num_blocks:
        pages = pages.new_zeros(1)  # a cache of no pages is no cache
    for name in paged:
        made[name] = args[name].index_select(0, pages)
    return made, pages
