"""Cache formats: what the bytes of a paged cache mean, by name. Without them a cache is converted at every call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glm5_hal.errors import HalError, suggest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CacheFormat:
    """The bytes of a paged cache. Ops take the format's tensors, ``[num_blocks, page_size, width]`` each.

    Attributes:
        name: fixed bytes: two backends that use one name can exchange caches.
        kind: "latent" (MLA's kv_lora_rank latent and its rope key) or "index" (the indexer's key).
        dtype: storage dtype; None is the activations' own.
        tensors: the op arguments that hold it.
        fields: order of "latent" (or the index key), "scale" and "rope" within a row.
        layout: in words, offsets in bytes.
        block_major: fields are laid out page by page, not token by token.
        group: elements that share one e4m3 quantisation scale; 0 where nothing is quantised.
        floor: where the scale's lower bound of 1e-4 applies, on the "scale" or on "amax". Scales are powers of two.
    """

    name: str
    kind: str
    dtype: str | None
    tensors: tuple[str, ...]
    fields: tuple[str, ...]
    layout: str
    block_major: bool = False
    group: int = 0
    floor: str = ""

    def widths(self, *dims: int) -> tuple[int, ...]:
        """Last dims of the format's tensors. ``dims``: (kv_lora_rank, rope_dim) or (index_head_dim,)."""
        expected = ("kv_lora_rank", "rope_dim") if self.kind == "latent" else ("index_head_dim",)
        if len(dims) != len(expected):
            raise HalError(
                "SHAPE",
                f"cache format {self.name} takes the dims ({', '.join(expected)}), got {dims}",
                value=dims,
                fix=f"pass {len(expected)} of them",
            )
        if self.group and dims[0] % self.group:
            raise HalError(
                "SHAPE",
                f"cache format {self.name} quantises groups of {self.group}; {dims[0]} is not a multiple of it",
                value=dims[0],
                fix="use an unquantised format for this width",
            )
        scales = 4 * (dims[0] // self.group) if self.group else 0
        if self.kind == "index":
            return (dims[0] + scales,)
        if len(self.tensors) == 2:
            return (dims[0], dims[1])
        return (dims[0] + dims[1],) if not self.group else (dims[0] + scales + 2 * dims[1],)

    def bytes_per_token(self, *dims: int, itemsize: int = 2) -> int:
        return sum(self.widths(*dims)) * (1 if self.dtype == "uint8" else itemsize)

    def allocate(
        self, num_blocks: int, page_size: int, *dims: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, ...]:
        """Zeroed tensors of the format, ``[num_blocks, page_size, width]``, for activations of ``dtype``."""
        import torch

        storage = dtype if self.dtype is None else getattr(torch, self.dtype)
        return tuple(
            torch.zeros(num_blocks, page_size, width, dtype=storage, device=device) for width in self.widths(*dims)
        )


def _load_formats() -> dict[str, CacheFormat]:
    rows = json.loads(Path(__file__).with_name("formats.json").read_text(encoding="utf-8"))
    made = (CacheFormat(**{**row, "tensors": tuple(row["tensors"]), "fields": tuple(row["fields"])}) for row in rows)
    return {f.name: f for f in made}


#: The named formats, from ``formats.json``.
FORMATS: dict[str, CacheFormat] = _load_formats()


def formats(kind: str) -> tuple[str, ...]:
    """Names of the formats of one kind ("latent", "index")."""
    return tuple(name for name, f in FORMATS.items() if f.kind == kind)


def cache_format(name: str) -> CacheFormat:
    """A named format. Raises HalError("UNKNOWN") with the nearest name."""
    if name not in FORMATS:
        raise HalError("UNKNOWN", f"no cache format {name!r}", value=name, fix=suggest(name, FORMATS))
    return FORMATS[name]


def preferred_formats(backend: str, kind: str) -> tuple[CacheFormat, ...]:
    """The formats of one kind that a backend serves, its favourite first."""
    from glm5_hal import context

    offered = context.catalogue().backend(backend).cache_formats
    return tuple(cache_format(name) for name in offered.get(kind, ()))
