"""mla_cache_write: store each token's latent and rope key in its slot of the paged cache.

Legend: T tokens, L kv_lora_rank, R rope dim, N pages, P page size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import caches, checks, writes
from glm5_hal.ops._common.attention import KV_CACHE, ROPE_CACHE, cache_constraints
from glm5_hal.spec import FLOATS, Arg, BadInput, BitExact, Cost, Draw, Inputs, OpSpec, Pick, Sample, Scalar


def mla_cache_write(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    rope_cache: Tensor | None = None,
    *,
    cache_format: str = "latent_576",
) -> None:
    """Slot ``slot_mapping[t]`` of the cache gets ``kv_c[t]`` (after its norm) and ``k_pe[t]`` (after rope).

    A slot is block · page_size + offset; -1 skips the token. Nothing else in the cache changes, by a single bit. Two
    tokens with one slot: one of them is stored, which one is not defined.

    A format without quantisation stores the values as they are. The fp8 formats have fixed bytes: per group of 128
    latent dims, scale = the smallest power of two with max|x| / scale ≤ 448, at least 2^-13 (the 1e-4 floor on the
    scale, as a power of two), stored as fp32; codes = e4m3(x / scale), to nearest, ties to even, so nothing exceeds
    448; rope dims rounded to bfloat16. Values are read as fp32. A group that holds a NaN or an infinity becomes codes
    0x7F (NaN) with scale 1, all of it; non-finite rope dims stay what they are (the bits of a NaN are not defined).
    """
    wanted = slot_mapping >= 0
    held = caches.held(kv_cache, rope_cache)
    caches.write(FORMATS[cache_format], held, slot_mapping[wanted], kv_c[wanted], k_pe[wanted])


def check_values(args: Mapping[str, Any]) -> None:
    checks.slots("mla_cache_write", args["slot_mapping"], args["kv_cache"])


GLM5 = {"T": 256, "L": 512, "R": 64, "N": 8, "page": 64}
TINY = {"T": 19, "L": 256, "R": 16, "N": 4, "page": 8}


def samples() -> Iterator[Sample]:
    edge = frozenset({"edge"})
    for fmt in formats("latent"):
        yield Sample(f"rows-{fmt}", {**TINY, "format": fmt})
    for fmt in formats("latent"):
        if FORMATS[fmt].group:
            yield Sample(f"quantiser-{fmt}", {**TINY, "format": fmt, "rows": "edges", "skip": "none"}, tags=edge)
            yield Sample(f"nonfinite-{fmt}", {**TINY, "format": fmt, "rows": "broken"}, tags=edge)
    base = {**TINY, "format": "latent_576"}
    yield Sample("odd_widths", {**base, "L": 21, "R": 6}, tags=edge)
    yield Sample("page_of_one", {**base, "page": 1, "N": 40}, tags=edge)
    many = {**base, "L": 16, "R": 4, "T": 300, "page": 128, "N": 3, "skip": "first"}
    yield Sample("many_tokens", many, dtypes=("bfloat16",))
    slots = {**base, "L": 16, "R": 4, "T": 40, "page": 24, "N": 200}  # more than 4096
    yield Sample("many_slots", slots, tags=edge, dtypes=("bfloat16",))
    far = {**base, "L": 16, "R": 4, "T": 40, "N": 9000}  # slots whose number takes more than 16 bits
    yield Sample("far_slots", far, tags=edge, dtypes=("bfloat16",))
    yield Sample("every_slot", {**base, "T": 32, "skip": "none"}, tags=edge)
    yield Sample("one_token", {**base, "T": 1}, tags=edge)
    yield Sample("one_page", {**base, "T": 5, "N": 1}, tags=edge)
    yield Sample("two_pages_of_two", {**base, "T": 3, "N": 2, "page": 2}, tags=edge)
    yield Sample("all_skipped", {**base, "skip": "all"}, tags=edge)
    yield Sample("no_tokens", {**base, "T": 0}, tags=edge)
    for fmt in formats("latent"):
        dtypes = ("bfloat16", "float32") if fmt in ("latent_576", "fp8_656") else ("bfloat16",)
        yield Sample(f"glm5-{fmt}", {**GLM5, "format": fmt}, "standard", tags=frozenset({"glm5"}), dtypes=dtypes)


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    T, L, R, fmt = axes["T"], axes["L"], axes["R"], FORMATS[axes["format"]]
    kv_c = writes.rows(draw, T, L, dtype, group=fmt.group)
    if axes.get("rows") == "edges":
        kv_c = writes.quantiser_edges(L, fmt.group, dtype)
    if axes.get("rows") == "broken":
        kv_c = writes.broken_groups(kv_c, fmt.group)
    T = len(kv_c)
    slots = writes.slots(draw, T, axes["N"] * axes["page"], skipped=axes.get("skip", "some"))
    k_pe = writes.rows(draw, T, R, dtype)
    if axes.get("rows") == "broken":
        k_pe[0, :4] = torch.tensor([torch.inf, 1.0, -torch.inf, 1.0])
        k_pe[1, :2] = torch.tensor([3.4e38, -3.4e38])  # beyond bfloat16's largest, which is infinity there
    args = {
        "kv_c": kv_c,
        "k_pe": k_pe,
        "slot_mapping": slots,
        "cache_format": fmt.name,
        **writes.held(draw, fmt, axes["N"], axes["page"], (L, R), dtype),
    }
    skipped = (slots < 0)[:, None]
    return Inputs(args, {name: skipped.expand_as(args[name]).clone() for name in ("kv_c", "k_pe")})


def fuzz(pick: Pick) -> Sample:
    tokens, page = pick.integer(0, 40), pick.of((8, 1, 16))
    axes = {"T": tokens, "L": 128 * pick.integer(1, 3), "R": 2 * pick.integer(1, 20), "page": page}
    room = {"N": -(-max(tokens, 1) // page) + pick.integer(0, 3), "skip": pick.of(("some", "none", "all"))}
    return Sample("fuzz", {**axes, **room, "format": pick.of(formats("latent"))})


def cost(axes: Mapping[str, Any]) -> Cost:
    T, W = axes["T"], axes["L"] + axes["R"]
    return Cost(flops=T * W, bytes=T * (axes["itemsize"] * W + axes["cache_row"] + 8))


def _other_rope_cache(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, "rope_cache": args["kv_cache"][..., : args["k_pe"].shape[-1]].contiguous()}


SPEC = OpSpec(
    name="mla_cache_write",
    group="mla",
    reference=mla_cache_write,
    args=(
        Arg("kv_c", "T L", "F", "latents, after their norm"),
        Arg("k_pe", "T R", "F", "rope keys, after rope"),
        KV_CACHE,
        writes.SLOTS,
        ROPE_CACHE,
    ),
    scalars=(Scalar("cache_format", "named cache format", choices=formats("latent")),),
    outs=(),
    mutates=("kv_cache", "rope_cache"),
    dtypes={"F": FLOATS, "C": (*FLOATS, "uint8")},
    constraints=cache_constraints("L", "R", "kv_c"),
    rounding="the format's: none, or e4m3 with a power-of-two scale per 128 and rope in bfloat16; bytes are fixed",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"kv_cache": BitExact(), "rope_cache": BitExact()},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        *writes.slot_errors("kv_cache"),
        BadInput("rope_cache_not_of_format", "SHAPE", _other_rope_cache),
        BadInput("quantised_width", "SHAPE", lambda args: {**args, "cache_format": "fp8_656"}),
    ),
    source="spec 3.1, 4.5, 6.1, 14.3",
)
