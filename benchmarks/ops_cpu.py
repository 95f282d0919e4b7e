"""Provider torch on the CPU at GLM-5's widths: beside peers in the same process, and against this machine's limits.

A peer is what one would write in plain torch: the best eager form, torch's own scaled_dot_product_attention, or the
dense attention with a mask of transformers. Peers get their keys unpaged and contiguous, and compute in the storage
dtype: in bfloat16 they round scores that the kernels keep in float32. Runs alternate; each time is the least of
several. The limit of a call is the larger of its flops over the measured rate of torch's own matrix product in the
call's dtype, and its bytes over the measured rate of reading memory; flops and bytes are those of the op's ``cost``.

    python benchmarks/ops_cpu.py [--json] [--op GLOB] [--threads N] [--repeat N]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _measure import Call, least, rates
from torch import Tensor
from torch.nn import functional

import glm5_hal
from glm5_hal import ops
from glm5_hal.formats import FORMATS, CacheFormat
from glm5_hal.ops import specs
from glm5_hal.ops._common.costs import cost_of

HEADS, LATENT, ROPE, HEAD_DIM, SCALE = 64, 512, 64, 256, 0.0625
INDEX_HEADS, INDEX_DIM, TOP_K = 32, 128, 2048
PAGE = 64


@dataclass(frozen=True)
class Point:
    """One op at one shape, and others that compute the same from the same numbers."""

    op: str
    shape: str
    dtype: str
    args: Mapping[str, Any]
    peers: Mapping[str, Call] = field(default_factory=dict)
    cache_format: str = ""


# --- inputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """``requests`` of ``tokens`` new ones and ``keys`` cached keys each: paged for the op, plain for its peers."""

    args: Mapping[str, Any]
    plain: tuple[Tensor, ...]


def cached(fmt: CacheFormat, requests: int, tokens: int, keys: int, dtype: torch.dtype) -> Cached:
    pages = keys // PAGE
    table = torch.randperm(requests * pages).int().view(requests, pages)
    latent = fmt.kind == "latent"
    rows = torch.randn(requests * keys, LATENT + ROPE if latent else INDEX_DIM).to(dtype)
    held = fmt.allocate(requests * pages, PAGE, *((LATENT, ROPE) if latent else (INDEX_DIM,)), dtype=dtype)
    slots = (table.flatten().long()[:, None] * PAGE + torch.arange(PAGE)).flatten()
    named = dict(zip(fmt.tensors, held, strict=True))
    if latent:
        ops.mla_cache_write(rows[:, :LATENT], rows[:, LATENT:], slot_mapping=slots, cache_format=fmt.name, **named)
    else:
        ops.index_cache_write(rows, slot_mapping=slots, cache_format=fmt.name, **named)
    args = {
        **named,
        "block_table": table,
        "seq_lens": torch.full((requests,), keys, dtype=torch.int32),
        "cu_seqlens_q": torch.arange(0, (requests + 1) * tokens, tokens, dtype=torch.int32),
        "cache_format": fmt.name,
    }
    return Cached(args, rows.chunk(requests))


# --- points ----------------------------------------------------------------------------------------------------------


def mla_decode() -> Iterator[Point]:
    for form, name, requests, keys in (
        ("latent_576", "bfloat16", 1, 4096),
        ("latent_576", "bfloat16", 1, 65536),
        ("latent_576", "bfloat16", 4, 16384),
        ("latent_576", "float32", 1, 4096),
        ("latent_576", "float32", 1, 65536),
        ("fp8_656", "bfloat16", 1, 65536),
    ):
        dtype = getattr(torch, name)
        made, q = cached(FORMATS[form], requests, 1, keys, dtype), torch.randn(requests, HEADS, LATENT + ROPE).to(dtype)

        def eager(q: Tensor = q, plain: tuple[Tensor, ...] = made.plain) -> list[Tensor]:
            return [((q[r] @ k.T) * SCALE).softmax(-1) @ k[:, :LATENT] for r, k in enumerate(plain)]

        def sdpa(q: Tensor = q, plain: tuple[Tensor, ...] = made.plain) -> list[Tensor]:
            """Keys as their own values: with values narrower than keys torch falls back to its slow form."""
            return [_sdpa(q[r], k)[:, :LATENT] for r, k in enumerate(plain)]

        args = {"q": q, "scale": SCALE, "kv_lora_rank": LATENT, **made.args}
        yield Point("mla_decode", f"B{requests} S{keys}", name, args, {"eager": eager, "sdpa": sdpa}, form)


def sparse_mla() -> Iterator[Point]:
    for form, name, tokens, keys in (
        ("latent_576", "bfloat16", 1, 65536),
        ("latent_576", "bfloat16", 4, 65536),
        ("latent_576", "bfloat16", 64, 16384),
        ("latent_576", "float32", 1, 65536),
        ("fp8_656", "bfloat16", 1, 65536),
    ):
        dtype = getattr(torch, name)
        made, q = cached(FORMATS[form], 1, tokens, keys, dtype), torch.randn(tokens, HEADS, LATENT + ROPE).to(dtype)
        chosen = torch.stack([torch.randperm(keys)[:TOP_K].sort().values for _ in range(tokens)]).int()

        def gather(q: Tensor = q, chosen: Tensor = chosen, keys: Tensor = made.plain[0]) -> list[Tensor]:
            rows = [keys.index_select(0, some) for some in chosen]
            return [((q[t] @ k.T) * SCALE).softmax(-1) @ k[:, :LATENT] for t, k in enumerate(rows)]

        def sdpa(q: Tensor = q, chosen: Tensor = chosen, keys: Tensor = made.plain[0]) -> list[Tensor]:
            return [_sdpa(q[t], keys.index_select(0, some))[:, :LATENT] for t, some in enumerate(chosen)]

        def dense_and_mask(q: Tensor = q, chosen: Tensor = chosen, keys: Tensor = made.plain[0]) -> list[Tensor]:
            bias = q.new_full((len(q), len(keys)), torch.finfo(q.dtype).min).scatter_(1, chosen.long(), 0.0)
            scores = ((q[t] @ keys.T) * SCALE + bias[t] for t in range(len(q)))
            return [s.softmax(-1) @ keys[:, :LATENT] for s in scores]

        peers = {"gather": gather, "sdpa": sdpa} | ({"dense+mask": dense_and_mask} if tokens == 1 else {})
        args = {"q": q, "indices": chosen, "scale": SCALE, "kv_lora_rank": LATENT, **made.args}
        yield Point("sparse_mla", f"T{tokens} S{keys} K{TOP_K}", name, args, peers, form)


INDEXED = (
    ("bf16_128", "bfloat16", 1, 4096),
    ("bf16_128", "bfloat16", 1, 65536),
    ("bf16_128", "bfloat16", 4, 65536),
    ("bf16_128", "bfloat16", 64, 16384),
    ("bf16_128", "float32", 1, 65536),
    ("fp8_132", "bfloat16", 1, 65536),
)


def indexer_logits() -> Iterator[Point]:
    yield from _indexer("indexer_logits")


def lightning_indexer() -> Iterator[Point]:
    yield from _indexer("lightning_indexer")


def _indexer(op: str) -> Iterator[Point]:
    """The eager peers leave the causal mask out, which is in their favour."""
    for form, name, tokens, keys in INDEXED:
        dtype = getattr(torch, name)
        made, q = cached(FORMATS[form], 1, tokens, keys, dtype), torch.randn(tokens, INDEX_HEADS, INDEX_DIM).to(dtype)
        weights, plain = torch.randn(tokens, INDEX_HEADS) * 2.0**-6, made.plain[0]

        def eager(q: Tensor = q, w: Tensor = weights, k: Tensor = plain) -> Tensor:
            scores = (q.flatten(0, 1) @ k.T).relu_().view(len(q), -1, len(k))
            return torch.bmm(w.to(scores.dtype)[:, None], scores)[:, 0]

        def keys_first(q: Tensor = q, w: Tensor = weights, k: Tensor = plain) -> Tensor:
            scores = (k @ q.flatten(0, 1).T).relu_().view(len(k), len(q), -1).transpose(0, 1)
            return torch.bmm(scores, w.to(scores.dtype)[..., None])[..., 0]

        def in_float32(q: Tensor = q, w: Tensor = weights, k: Tensor = plain) -> Tensor:
            """As transformers has it."""
            return torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q.float(), k.float()).relu_(), w)

        peers: dict[str, Call] = {"eager": eager, "keys first": keys_first}
        if tokens == 1:
            peers["float32"] = in_float32
        args = {"q": q, "weights": weights, **made.args}
        if op == "indexer_logits":
            yield Point(op, f"T{tokens} S{keys}", name, {**args, "max_seq_len": keys}, peers, form)
        else:
            chosen = {n: (lambda score=score: score().topk(TOP_K, sorted=False).indices) for n, score in peers.items()}
            yield Point(op, f"T{tokens} S{keys} K{TOP_K}", name, {**args, "top_k": TOP_K}, chosen, form)


def topk_indices() -> Iterator[Point]:
    for tokens, keys in ((1, 65536), (64, 16384)):
        scores = torch.randn(tokens, keys)
        peers = {
            "topk": lambda s=scores: s.topk(TOP_K, sorted=False).indices,
            "topk, ascending": lambda s=scores: s.topk(TOP_K, sorted=False).indices.sort(-1).values.int(),
            "stable sort": lambda s=scores: s.sort(stable=True, descending=True).indices[:, :TOP_K].sort(-1).values,
        }
        args = {"scores": scores, "seq_lens": torch.full((tokens,), keys, dtype=torch.int32), "top_k": TOP_K}
        yield Point("topk_indices", f"T{tokens} S{keys} K{TOP_K}", "float32", args, peers)


def mla_prefill() -> Iterator[Point]:
    """The op's cost has no mask; where a chunk sees itself under the causal one, up to half need not be done."""
    for name, tokens, keys in (("bfloat16", 512, 512), ("float32", 512, 512), ("bfloat16", 128, 2048)):
        dtype = getattr(torch, name)
        q, k, v = (torch.randn(n, HEADS, HEAD_DIM).to(dtype) for n in (tokens, keys, keys))
        mask = None if tokens == keys else torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)

        def sdpa(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor | None = mask) -> Tensor:
            heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
            return functional.scaled_dot_product_attention(
                *heads_first, attn_mask=mask, is_causal=mask is None, scale=SCALE
            )

        def eager(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            scores = q.transpose(0, 1) @ k.permute(1, 2, 0) * SCALE
            hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
            return scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ v.transpose(0, 1)

        offsets = {"cu_seqlens_q": torch.tensor([0, tokens]).int(), "cu_seqlens_k": torch.tensor([0, keys]).int()}
        args = {"q": q, "k": k, "v": v, "scale": SCALE, **offsets}
        yield Point("mla_prefill", f"T{tokens} S{keys}", name, args, {"sdpa": sdpa, "eager": eager})


def mla_cache_write() -> Iterator[Point]:
    for form, tokens in (("latent_576", 1), ("latent_576", 256), ("fp8_656", 256)):
        fmt, N = FORMATS[form], 64
        held = fmt.allocate(N, PAGE, LATENT, ROPE, dtype=torch.bfloat16)
        c, pe = torch.randn(tokens, LATENT).bfloat16(), torch.randn(tokens, ROPE).bfloat16()
        slots = torch.randperm(N * PAGE)[:tokens]

        def plain(cache: Tensor = held[0], c: Tensor = c, pe: Tensor = pe, slots: Tensor = slots) -> None:
            cache[slots // PAGE, slots % PAGE] = torch.cat([c, pe], -1)

        def quantised(cache: Tensor = held[0], c: Tensor = c, pe: Tensor = pe, slots: Tensor = slots) -> None:
            groups = c.float().unflatten(-1, (-1, 128))
            scale = torch.exp2((groups.abs().amax(-1) / 448).clamp_min(1e-4).log2().ceil())
            codes = (groups / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
            row = torch.cat([codes, scale.view(torch.uint8), pe.view(torch.uint8)], -1)
            cache[slots // PAGE, slots % PAGE] = row

        args = {"kv_c": c, "k_pe": pe, "kv_cache": held[0], "slot_mapping": slots, "cache_format": form}
        peer = quantised if fmt.group else plain
        yield Point("mla_cache_write", f"T{tokens}", "bfloat16", args, {"eager": peer}, form)


POINTS = (
    mla_prefill, mla_decode, sparse_mla, indexer_logits, topk_indices, lightning_indexer, mla_cache_write,
)  # fmt: skip


def _sdpa(q: Tensor, keys: Tensor) -> Tensor:
    """Heads as queries of one head."""
    return functional.scaled_dot_product_attention(q[None, None], keys[None, None], keys[None, None], scale=SCALE)[0, 0]


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(point: Point, limits: Mapping[str, float], repeat: int) -> dict[str, Any]:
    kernel = getattr(ops, point.op).bind(**point.args)
    times, _ = least({"torch": lambda: kernel(**point.args), **point.peers}, repeat)
    cost = cost_of(specs()[point.op], point.args, point.dtype)
    bound = max(cost.flops / limits[f"{point.dtype} GFLOP/s"], cost.bytes / limits["read GB/s"]) / 1e9
    peers = {name: seconds * 1e3 for name, seconds in times.items() if name != "torch"}
    best = min(peers, key=lambda name: peers[name])
    return {
        "op": point.op,
        "shape": point.shape,
        "dtype": point.dtype,
        "format": point.cache_format,
        "ms": times["torch"] * 1e3,
        "peers_ms": peers,
        "best_peer": best,
        "speedup": peers[best] / times["torch"] / 1e3,
        "limit_ms": bound * 1e3,
        "of_limit": bound / times["torch"],
        "gflops": cost.flops / times["torch"] / 1e9,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--op", default="*", help="only ops that match")
    parser.add_argument("--threads", type=int, help="as torch chooses, if not given")
    parser.add_argument("--repeat", type=int, default=7, help="runs of which the fastest counts")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode(), glm5_hal.use("cpu:torch", check="metadata"):
        limits = rates(options.repeat)
        if not options.json:
            print(f"{torch.get_num_threads()} threads; " + ", ".join(f"{v:.0f} {k}" for k, v in limits.items()))
            print(
                f"{'op':<18} {'shape':<18} {'dtype':<9} {'format':<11} {'ms':>8}  "
                f"{'best peer':<22} {'gain':>5}  of limit"
            )
        for points in POINTS:
            if fnmatch.fnmatch(points.__name__, options.op):
                for point in points():
                    rows.append(measure(point, limits, options.repeat))
                    if not options.json:
                        _show(rows[-1])
    if options.json:
        about = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        print(json.dumps({**about, "limits": limits, "rows": rows}, indent=2))


def _show(row: Mapping[str, Any]) -> None:
    peer = f"{row['best_peer']} {row['peers_ms'][row['best_peer']]:.2f}"
    print(
        f"{row['op']:<18} {row['shape']:<18} {row['dtype']:<9} {row['format']:<11} {row['ms']:>8.2f}  {peer:<22} "
        f"{row['speedup']:>4.1f}x  {row['of_limit']:>6.0%}"
    )


if __name__ == "__main__":
    main()
