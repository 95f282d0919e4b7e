"""What GLM-5 asks of its operators while it serves: decode steps and prefill chunks at its widths, on the device.

For timing only: numbers come of the device's own generator. Attention is that of one rank with all heads, experts are
those of one rank of 32, and what comes to it is spread evenly over them.

Legend: B requests of one new token each, T tokens of a chunk of one request, S cached keys, M rows of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS

Args = dict[str, Any]


@dataclass(frozen=True)
class Widths:
    """A model's, those of GLM-5 if not given. ``here`` of the experts are on this rank."""

    hidden: int = 6144
    heads: int = 64
    head: int = 256
    latent: int = 512
    rope: int = 64
    index_heads: int = 32
    index: int = 128
    top_k: int = 2048
    experts: int = 256
    here: int = 8
    per_token: int = 8
    inner: int = 2048
    page: int = 64
    scale: float = 0.0625


@dataclass(frozen=True)
class Load:
    """How many requests (or tokens of one request) at a time, and over how many keys each."""

    tokens: int
    keys: int
    chunk: bool = False

    def __str__(self) -> str:
        return f"{'T' if self.chunk else 'B'}{self.tokens} S{self.keys}"


@dataclass(frozen=True)
class Workload:
    """One call. ``make(device)`` gives its arguments; ``share`` of the work that its op declares is what it needs."""

    op: str
    shape: str
    make: Callable[[str], Args]
    cache_format: str = ""
    share: float = 1.0

    @property
    def dtype(self) -> str:
        return "float32" if self.op in ("moe_route", "topk_indices") else "bfloat16"


#: What a server meets: from one request to many, from short contexts to long ones, and chunks of a prompt.
SERVING = (
    Load(1, 8192), Load(1, 131072), Load(16, 8192), Load(16, 32768), Load(128, 8192), Load(128, 131072),
    Load(2048, 2048, True), Load(2048, 32768, True),
)  # fmt: skip
#: What block sizes are chosen by: fewer of these, each a regime of its own.
TUNED = (Load(1, 131072), Load(16, 32768), Load(128, 8192), Load(2048, 16384, True))

LATENTS, INDICES = ("latent_576", "fp8_656"), ("bf16_128", "fp8_132")


def workloads(loads: Sequence[Load] = SERVING, widths: Widths | None = None) -> Iterator[Workload]:
    """The calls of every op that has kernels of its own."""
    w = widths or Widths()
    tokens = sorted({load.tokens for load in loads})
    for T in tokens:
        yield from _of_tokens(w, T)
    for load in loads:
        yield from _over_keys(w, load)
    for T in sorted({max(T // 8, 1) for T in tokens}):  # an eighth of them come here, with all of their experts
        yield from _of_experts(w, T)


def _of_tokens(w: Widths, T: int) -> Iterator[Workload]:
    yield Workload("rms_norm", f"T{T}", partial(_norm, w, T, False))
    yield Workload("add_rms_norm", f"T{T}", partial(_norm, w, T, True))
    yield Workload("rope", f"T{T}", partial(_rope, w, T))
    yield Workload("silu_and_mul", f"T{T}", partial(_gated, w, T))
    yield Workload("hadamard", f"T{T}", partial(_hadamard, w, T))
    for form in LATENTS:
        yield Workload("mla_cache_write", f"T{T}", partial(_latent_write, w, T, form), form)
    for form in INDICES:
        yield Workload("index_cache_write", f"T{T}", partial(_index_write, w, T, form), form)
    yield Workload("moe_route", f"T{T}", partial(_routed, w, T))


def _over_keys(w: Widths, load: Load) -> Iterator[Workload]:
    if load.chunk:
        unseen = (load.tokens - 1) / 2  # keys that a token does not see, on the average
        yield Workload("mla_prefill", str(load), partial(_prefill, w, load), share=1 - unseen / load.keys)
    for form in LATENTS:
        if not load.chunk:
            yield Workload("mla_decode", str(load), partial(_absorbed, w, load, form), form)
        yield Workload("sparse_mla", str(load), partial(_sparse, w, load, form), form)
    for form in INDICES:
        yield Workload("indexer_logits", str(load), partial(_scored, w, load, form, {"max_seq_len": load.keys}), form)
        yield Workload("lightning_indexer", str(load), partial(_scored, w, load, form, {"top_k": w.top_k}), form)
    yield Workload("topk_indices", str(load), partial(_chosen, w, load))


def _of_experts(w: Widths, T: int) -> Iterator[Workload]:
    M = T * w.per_token
    yield Workload("moe_permute", f"M{M}", partial(_permuted, w, T))
    for N, K in ((2 * w.inner, w.hidden), (w.hidden, w.inner)):
        yield Workload("grouped_gemm", f"M{M} N{N} K{K}", partial(_multiplied, w, M, N, K))
    yield Workload("moe_combine", f"M{M}", partial(_combined, w, T))
    yield Workload("moe_experts", f"M{M}", partial(_experts, w, T))


# --- arguments -------------------------------------------------------------------------------------------------------


def _normal(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def _norm(w: Widths, T: int, add: bool, device: str) -> Args:
    more = {"residual": _normal(device, T, w.hidden)} if add else {}
    return {"x": _normal(device, T, w.hidden), **more, "weight": _normal(device, w.hidden), "eps": 1e-5}


def _rope(w: Widths, T: int, device: str) -> Args:
    """The last dims of every head, in place."""
    x, angles = _normal(device, T, w.heads, w.head), torch.rand(T, w.rope // 2, device=device)
    return {"x": x[..., w.head - w.rope :], "cos": angles.cos(), "sin": angles.sin(), "layout": "interleaved"}


def _gated(w: Widths, T: int, device: str) -> Args:
    return {"x": _normal(device, T, 2 * w.inner), "limit": None}


def _hadamard(w: Widths, T: int, device: str) -> Args:
    return {"x": _normal(device, T, w.index_heads, w.index), "scale": w.index**-0.5}


def _latent_write(w: Widths, T: int, form: str, device: str) -> Args:
    rows = {"kv_c": _normal(device, T, w.latent), "k_pe": _normal(device, T, w.rope)}
    return {**rows, "rope_cache": None, **_written(w, T, form, device)}


def _index_write(w: Widths, T: int, form: str, device: str) -> Args:
    return {"k": _normal(device, T, w.index), **_written(w, T, form, device)}


def _written(w: Widths, T: int, form: str, device: str) -> Args:
    pages = -(-T // w.page) + 1
    slots = torch.randperm(pages * w.page, device=device)[:T]
    return {**_filled(w, form, pages, device), "slot_mapping": slots, "cache_format": form}


def _filled(w: Widths, form: str, pages: int, device: str) -> Mapping[str, Tensor]:
    """The tensors of a cache. One of bytes has small ones, so that neither codes nor scales are NaN."""
    fmt = FORMATS[form]
    dims = (w.latent, w.rope) if fmt.kind == "latent" else (w.index,)
    held = fmt.allocate(pages, w.page, *dims, dtype=torch.bfloat16, device=device)
    for tensor in held:
        if fmt.group:
            tensor.random_(0, 0x39)
        else:
            tensor.normal_()
    return dict(zip(fmt.tensors, held, strict=True))


def _paged(w: Widths, load: Load, form: str, device: str) -> Args:
    requests, new = (1, load.tokens) if load.chunk else (load.tokens, 1)
    pages = -(-load.keys // w.page)
    table = torch.randperm(requests * pages, device=device).int().view(requests, pages)
    lens = torch.full((requests,), load.keys, dtype=torch.int32, device=device)
    offsets = torch.arange(0, (requests + 1) * new, new, dtype=torch.int32, device=device)
    batch = {"block_table": table, "seq_lens": lens, "cu_seqlens_q": offsets, "cache_format": form}
    return {**_filled(w, form, requests * pages, device), **batch}


def _absorbed(w: Widths, load: Load, form: str, device: str) -> Args:
    q = _normal(device, load.tokens, w.heads, w.latent + w.rope)
    scalars = {"scale": w.scale, "kv_lora_rank": w.latent}
    return {"q": q, "rope_cache": None, **scalars, **_paged(w, load, form, device)}


def _sparse(w: Widths, load: Load, form: str, device: str) -> Args:
    """Every token's own choice: a key of each of top_k stretches of the context, or all keys where these are fewer."""
    K, T = w.top_k, load.tokens
    if load.keys <= K:
        chosen = torch.arange(K, device=device).expand(T, K)
        chosen = torch.where(chosen < load.keys, chosen, -1)
    else:
        stretch = load.keys // K
        chosen = torch.arange(0, K * stretch, stretch, device=device) + torch.randint(stretch, (T, K), device=device)
    return {**_absorbed(w, load, form, device), "indices": chosen.int()}


def _prefill(w: Widths, load: Load, device: str) -> Args:
    q, k, v = (_normal(device, n, w.heads, w.head) for n in (load.tokens, load.keys, load.keys))
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (load.tokens, load.keys))
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "scale": w.scale, "causal": True}


def _scored(w: Widths, load: Load, form: str, more: Args, device: str) -> Args:
    q = _normal(device, load.tokens, w.index_heads, w.index)
    weights = torch.randn(load.tokens, w.index_heads, device=device) * 2.0**-6
    return {"q": q, "weights": weights, **_paged(w, load, form, device), **more}


def _chosen(w: Widths, load: Load, device: str) -> Args:
    lens = torch.full((load.tokens,), load.keys, dtype=torch.int32, device=device)
    return {"scores": torch.randn(load.tokens, load.keys, device=device), "seq_lens": lens, "top_k": w.top_k}


def _routed(w: Widths, T: int, device: str) -> Args:
    choice: Args = {"top_k": w.per_token, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    choice |= {"routed_scaling_factor": 2.5, "scoring_func": "sigmoid"}
    logits, bias = torch.randn(T, w.experts, device=device), torch.randn(w.experts, device=device)
    return {"router_logits": logits, "bias": bias, **choice}


def _ids(w: Widths, T: int, device: str) -> Tensor:
    """Every token's experts: of those that are here, in an order of its own."""
    return torch.rand(T, w.here, device=device).argsort(-1)[:, : w.per_token].int()


def _permuted(w: Widths, T: int, device: str) -> Args:
    return {"x": _normal(device, T, w.hidden), "topk_ids": _ids(w, T, device), "num_experts": w.here}


def _multiplied(w: Widths, M: int, N: int, K: int, device: str) -> Args:
    offsets = torch.linspace(0, M, w.here + 1, device=device).int()
    weight = _normal(device, w.here, N, K) * K**-0.5
    return {"x": _normal(device, M, K), "weight": weight, "expert_offsets": offsets, "weight_format": "plain"}


def _combined(w: Widths, T: int, device: str) -> Args:
    M = T * w.per_token
    rows = torch.arange(M, dtype=torch.int32, device=device).view(T, -1)
    weights = torch.rand(T, w.per_token, device=device)
    y, shared = _normal(device, M, w.hidden), _normal(device, T, w.hidden)
    return {"y": y, "topk_weights": weights, "inverse_ids": rows, "shared": shared}


def _experts(w: Widths, T: int, device: str) -> Args:
    gate_up = _normal(device, w.here, 2 * w.inner, w.hidden) * w.hidden**-0.5
    down = _normal(device, w.here, w.hidden, w.inner) * w.inner**-0.5
    routed = {"topk_weights": torch.rand(T, w.per_token, device=device), "topk_ids": _ids(w, T, device)}
    more = {"shared": None, "limit": None, "weight_format": "plain"}
    return {"x": _normal(device, T, w.hidden), **routed, "w_gate_up": gate_up, "w_down": down, **more}
