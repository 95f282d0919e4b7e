"""The tensors of a model's cache: what they are made of, and making them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glm5_hal.state import CacheFormat


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


def allocated(layout: Layout, pages: int, keep: bool) -> tuple[list[tuple[Tensor, ...]], list[Tensor | None]]:
    """Each layer's tensors; the same ones for all layers if nothing is to be kept."""

    def made(fmt: CacheFormat, *dims: int) -> tuple[Tensor, ...]:
        return fmt.allocate(pages, layout.page_size, *dims, dtype=layout.dtype, device=layout.device)

    layers = len(layout.indexed) if keep else 1
    latent = [made(layout.latent, *layout.latent_dims) for _ in range(layers)]
    index = [made(layout.index, layout.index_dim)[0] if has or not keep else None for has in layout.indexed[:layers]]
    return (latent, index) if keep else (latent * len(layout.indexed), index * len(layout.indexed))


def tensors(latent: Sequence[tuple[Tensor, ...]], index: Sequence[Tensor | None]) -> list[Tensor]:
    """Every tensor once."""
    held = [*(t for layer in latent for t in layer), *(t for t in index if t is not None)]
    return list({id(t): t for t in held}.values())
