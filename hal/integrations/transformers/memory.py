"""The tensors of a model's cache: what they are made of, and making them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_hal.formats import CacheFormat


@dataclass(frozen=True)
class Layout:
    """What a model's cache is made of.

    Attributes:
        latent, index: formats of the latent and of the indexer's keys.
        latent_dims: (kv_lora_rank, rope_dim).
        index_dim: index_head_dim.
        indexed: for each layer, whether it has an indexer of its own.
        page_size: tokens per page.
        dtype, device: of the activations.
    """

    latent: CacheFormat
    index: CacheFormat
    latent_dims: tuple[int, int]
    index_dim: int
    indexed: tuple[bool, ...]
    page_size: int
    dtype: torch.dtype
    device: torch.device


def grow(
    layout: Layout, latent: list[tuple[Tensor, ...]], index: list[Tensor | None], pages: int, *, keep: bool
) -> None:
    """Room for ``pages`` in the lists of each layer's tensors, in place; one layer's serve all if nothing is kept.

    One layer after the other, so that no two are held twice at a time. Wherever memory runs out, each layer still holds
    what it did, and a later call goes on from there.
    """
    layers = len(layout.indexed)
    with torch.inference_mode(False):  # whatever mode this pass runs in, a later one must be able to write
        for i in range(layers if keep else 1):
            latent[i] = _larger(layout, pages, layout.latent, layout.latent_dims, latent[i])
            if layout.indexed[i] or not keep:
                held = index[i]
                index[i] = _larger(layout, pages, layout.index, (layout.index_dim,), () if held is None else (held,))[0]
    if not keep:
        latent[:], index[:] = latent[:1] * layers, index[:1] * layers


def _larger(
    layout: Layout, pages: int, fmt: CacheFormat, dims: tuple[int, ...], held: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Tensors with room for ``pages`` and what is held so far: the same ones, or twice as large at least."""
    before = held[0].shape[0] if held else 0
    if pages <= before:
        return held
    made = fmt.allocate(max(pages, 2 * before), layout.page_size, *dims, dtype=layout.dtype, device=layout.device)
    for new, old in zip(made, held, strict=False):
        new[:before] = old
    return made


def tensors(latent: Sequence[tuple[Tensor, ...]], index: Sequence[Tensor | None]) -> list[Tensor]:
    """Every tensor once."""
    held = [*(t for layer in latent for t in layer), *(t for t in index if t is not None)]
    return list({id(t): t for t in held}.values())
