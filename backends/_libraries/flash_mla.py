"""Libraries with FlashMLA's functions: what is done about the conventions that they share.

- they know batches of equally many tokens, or none: each token is a request of its own, which sees as many keys as the
  causal mask lets it. With 64 heads or more a token fills its tile, so nothing is lost by that.
- a key is named by its place in the cache, an absent one by -1, and their number is a multiple: indices are resolved
  and padded.
- lse is the natural logarithm, and +inf where exponentials add up to nothing: where no score is finite, which here is
  NaN. Of a token without a key some write nothing at all; here it has output 0 and lse -inf.
- a dense kernel may leave a sum that is NaN out of its lse; its output says where.

Legend: T tokens, H heads, W = L+R absorbed width (latent, rope), K indices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from glm5_hal.backends._libraries.physical import aligned, per_step, requests_of, rows, slots, visible
from glm5_hal.capability import when

LATENT, WIDTH = 512, 576

#: Tokens of a call that is split over the whole chip. It keeps parts of every token in fp32, 128 KB each.
TOKENS = 1024

POSITIVE = when(
    lambda call: call.scalars["scale"] > 0,
    "it looks for the largest score before it scales: only a positive scale keeps the order",
    "use a positive scale, or another kernel",
    reads=(("scale", "value"),),
)

FEW = when(
    lambda call: call.scalars["cache_format"] != "fp8_656" or call.axes["T"] <= TOKENS,
    f"over an fp8 cache T is at most {TOKENS}",
    "split the batch, or use another kernel",
    reads=(("cache_format", "value"), ("T", "value")),
)


@dataclass(frozen=True)
class Interface:
    """One library's.

    Attributes:
        module: what is imported.
        multiple: what the number of indices is a multiple of, for every one of its kernels.
        schedule: of the module, queries [T, 1, H, W], numbers of keys [T] and of indices (either may be None): what
            goes in as ``tile_scheduler_metadata`` and ``num_splits``. It is good for calls that agree in all of these.
            None where the only kernel in use is the sparse one over a latent cache.
        ahead: places of the block table that are read beyond the last key, in keys.
    """

    module: str
    multiple: int
    schedule: Callable[[Any, Tensor, Tensor | None, int | None], tuple[Any, Any]] | None = None
    ahead: int = 0

    @property
    def library(self) -> Any:
        return import_module(self.module)

    def sparse(
        self,
        q: Tensor,
        kv_cache: Tensor,
        indices: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor,
        *,
        scale: float,
        cache_format: str,
    ) -> tuple[Tensor, Tensor]:
        """`sparse_mla` over latent_576, or over fp8_656."""
        if nothing(q, kv_cache, block_table, indices):
            return no_keys(q)
        P, request, q = kv_cache.shape[1], requests_of(cu_seqlens_q, len(q)), aligned(q)
        if cache_format == "latent_576":
            keys, apart = rows(kv_cache)
            chosen = slots(indices, block_table, request, P, apart, self.multiple)
            out, _, lse = self.library.flash_mla_sparse_fwd(q, keys, chosen[:, None], scale, LATENT)
            return ours(out, lse, (chosen < 0).all(-1))
        chosen = slots(indices, block_table, request, P, P, self.multiple)
        plan = self._plan("sparse", q, P, chosen.shape[1], None, seq_lens, cu_seqlens_q)
        out, lse = self.library.flash_mla_with_kvcache(
            q[:, None], kv_cache[:, :, None], None, None, LATENT, *plan,
            softmax_scale=scale, is_fp8_kvcache=True, indices=chosen[:, None],
        )  # fmt: skip
        return ours(out[:, 0], lse.reshape(lse.shape[0], -1), (chosen < 0).all(-1))

    def dense(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        cu_seqlens_q: Tensor,
        *,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """`mla_decode` over latent_576."""
        if nothing(q, kv_cache, block_table):
            return no_keys(q)
        request = requests_of(cu_seqlens_q, len(q))
        seen = visible(cu_seqlens_q, seq_lens, request)
        P, table = kv_cache.shape[1], block_table.index_select(0, request)
        if self.ahead:
            table = torch.nn.functional.pad(table, (0, -(-self.ahead // P)))
        plan = self._plan("dense", q, P, table.shape[1], seen, seq_lens, cu_seqlens_q)
        return self.attend(aligned(q), kv_cache, table, seen, plan, scale)

    def attend(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, seen: Tensor, plan: tuple[Any, Any], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Every token over the first ``seen [T]`` keys of its row of ``table``."""
        out, lse = self.library.flash_mla_with_kvcache(
            q[:, None], kv_cache[:, :, None], table, seen, LATENT, *plan, softmax_scale=scale
        )
        out, lse = ours(out[:, 0], lse.reshape(lse.shape[0], -1), seen == 0)
        return out, torch.where(out[..., 0].isnan(), torch.nan, lse)

    def _plan(
        self, kind: str, q: Tensor, page: int, width: int, seen: Tensor | None, seq_lens: Tensor, cu_seqlens_q: Tensor
    ) -> tuple[Any, Any]:
        topk, schedule = width if seen is None else None, self.schedule
        assert schedule is not None, "only the sparse kernel over a latent cache needs none"
        return per_step(  # type: ignore[no-any-return]
            (self.module, kind, q.device, q.shape, page, width),
            lambda: schedule(self.library, q[:, None], seen, topk),
            seq_lens,
            cu_seqlens_q,
        )


def ours(out: Tensor, lse: Tensor, keyless: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H, L] outputs and [T, H] logarithms, of tokens of which some have no key [T]."""
    lost, value = (lse == torch.inf) | keyless[:, None], torch.where(keyless, 0.0, torch.nan)[:, None]
    return torch.where(lost[..., None], value[..., None].to(out.dtype), out), torch.where(lost, value - torch.inf, lse)


def nothing(*tensors: Tensor) -> bool:
    return any(t.numel() == 0 for t in tensors)


def no_keys(q: Tensor) -> tuple[Tensor, Tensor]:
    T, H, _ = q.shape
    return q.new_zeros(T, H, LATENT), q.new_full((T, H), -torch.inf, dtype=torch.float32)
