"""torch's own fused attention, where it computes what an op asks for. It gives the lse, which torch's public function
keeps to itself. In float32: in narrower dtypes its exp is a faster one, and the lse is off by 6e-5.

Legend: n queries and m keys of one request, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from glm5_hal.backend import Kernel, kernel
from glm5_hal.capability import dtype, when
from glm5_hal.plan import host_list

#: Heads that are widened at a time: few, so that the buffers are ones that the allocator keeps (below 32 MB).
HEADS = 4

_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@kernel(
    "mla_prefill",
    "sdpa",
    requires=(
        dtype("q", "bfloat16", "float16", "float32"),
        when(
            lambda call: call.scalars["scale"] > 0,
            "torch masks before it scales: only a positive scale keeps −inf",
            "use a positive scale, or another kernel",
            reads=(("scale", "value"),),
        ),
    ),
    provides=("deterministic",),
)
def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    requests = zip(pairwise(host_list(cu_seqlens_q)), pairwise(host_list(cu_seqlens_k)), strict=True)
    parts = [_request(q[a:b], k[low:high], v[low:high], scale, causal) for (a, b), (low, high) in requests]
    if len(parts) == 1:
        return parts[0]
    nothing = q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(0, q.shape[1], dtype=torch.float32)
    out, lse = zip(nothing, *parts, strict=True)
    return torch.cat(out), torch.cat(lse)


def _request(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One request's [n, H, D] queries over its [m, H, D] keys: out [n, H, D] in their dtype, lse [n, H]."""
    (n, H, _), m = q.shape, len(k)
    blind = n if m == 0 else max(n - m, 0) if causal else 0  # the first queries, which see no key
    if q.dtype == torch.float32 and blind == 0 and n > 0 and H > 0:
        out, lse = _attended(q, k, v, scale, causal)
        return out.contiguous(), lse.contiguous()
    out, lse = q.new_empty(n, H, v.shape[-1]), q.new_empty(n, H, dtype=torch.float32)
    out[:blind], lse[:blind] = 0.0, -torch.inf
    for head in range(0, H if blind < n else 0, HEADS):
        heads = slice(head, head + HEADS)
        out[blind:, heads], lse[blind:, heads] = _attended(q[blind:, heads], k[:, heads], v[:, heads], scale, causal)
    return out, lse


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """[n, H, D] queries, at most m of them, over [m, H, D] keys: in fp32."""
    widest, dims = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    q, k, v = (_wide(t, widest) for t in (q, k, v))
    before = k.shape[-2] - q.shape[-2] if causal else k.shape[-2]  # keys that every query sees
    parts = [
        _fused(q, k[..., span, :], v[..., span, :], scale, square)
        for span, square in ((slice(None, before), False), (slice(before, None), True))
        if len(range(k.shape[-2])[span])
    ]
    out, lse = parts[0] if len(parts) == 1 else _merged(*parts)
    if not (finite := lse.isfinite()).all():
        out = out.masked_fill(~finite[..., None], torch.nan)
    return out[0].transpose(0, 1)[..., :dims], lse[0].T


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, square: bool) -> tuple[Tensor, Tensor]:
    """[1, H, n, D] queries over [1, H, m, D] keys; where ``square``, query i sees the first i+1."""
    out, lse = _flash(q, k, v, 0.0, square, scale=scale)
    for _, head, i in (lse == 0).nonzero().tolist():  # what torch makes of scores that are all NaN or all -inf
        scores = q[0, head, i] @ k[0, head, : i + 1 if square else None].T
        if not (scores > -torch.inf).any():
            lse[0, head, i] = torch.nan if scores.isnan().any() else -torch.inf
    return out, lse


def _wide(t: Tensor, width: int) -> Tensor:
    """[1, H, n, width] in fp32: it takes one head dim, and zeros add nothing."""
    t = t.transpose(0, 1)[None].float()
    return pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t if t.stride(-1) == 1 else t.contiguous()


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, from attention over each."""
    lse = torch.logaddexp(one[1], other[1])
    first, second = (out * (part - lse).exp()[..., None] for out, part in (one, other))
    return first + second, lse


def kernels() -> Sequence[Kernel]:
    """What this build of torch can serve."""
    return () if _flash is None else (mla_prefill,)
