"""index_cache_write: store each token's index key in its slot of the paged index cache.

Legend: T tokens, D index head dim, N pages, P page size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import caches, checks, writes
from glm5_hal.ops._common.indexer import INDEX_CACHE, INDEX_SCALARS, index_constraints
from glm5_hal.spec import FLOATS, Arg, BadInput, BitExact, Cost, Draw, Inputs, OpSpec, Pick, Sample


def index_cache_write(k: Tensor, index_cache: Tensor, slot_mapping: Tensor, *, cache_format: str = "bf16_128") -> None:
    """Slot ``slot_mapping[t]`` of the index cache gets ``k[t]`` (after norm, rope and, where used, Hadamard).

    A slot is block · page_size + offset; -1 skips the token. Nothing else in the cache changes, by a single bit. Two
    tokens with one slot: one of them is stored, which one is not defined. Every token's key is written, also where
    scoring is skipped because all keys are selected anyway, and for drafted tokens.

    ``bf16_128`` stores the key as it is, in the activations' dtype. ``fp8_132`` has fixed bytes, page by page: first
    the codes of all P keys of the page (D bytes each), then their scales (one fp32 per 128 dims). scale = the smallest
    power of two with max(max|k|, 1e-4) / scale ≤ 448: the floor is on the maximum here, so scales reach down to 2^-22;
    codes = e4m3(k / scale), to nearest, ties to even, so nothing exceeds 448. Values are read as fp32. A group that
    holds a NaN or an infinity becomes codes 0x7F (NaN) with scale 1, all of it.
    """
    wanted = slot_mapping >= 0
    caches.write(FORMATS[cache_format], (index_cache,), slot_mapping[wanted], k[wanted], None)


def check_values(args: Mapping[str, Any]) -> None:
    checks.slots("index_cache_write", args["slot_mapping"], args["index_cache"])


GLM5 = {"T": 256, "D": 128, "N": 8, "page": 64}
TINY = {"T": 19, "D": 128, "N": 4, "page": 8}


def samples() -> Iterator[Sample]:
    edge = frozenset({"edge"})
    for fmt in formats("index"):
        yield Sample(f"rows-{fmt}", {**TINY, "format": fmt})
        yield Sample(f"two_groups-{fmt}", {**TINY, "D": 256, "format": fmt})
        yield Sample(f"page_of_one-{fmt}", {**TINY, "page": 1, "N": 40, "format": fmt}, tags=edge)
        yield Sample(f"every_slot-{fmt}", {**TINY, "T": 32, "skip": "none", "format": fmt}, tags=edge)
        yield Sample(f"no_pages-{fmt}", {**TINY, "T": 2, "N": 0, "skip": "all", "format": fmt}, tags=edge)
    yield Sample("quantiser-fp8_132", {**TINY, "format": "fp8_132", "rows": "edges", "skip": "none"}, tags=edge)
    yield Sample("nonfinite-fp8_132", {**TINY, "format": "fp8_132", "rows": "broken"}, tags=edge)
    base = {**TINY, "format": "bf16_128"}
    many = {**base, "D": 16, "T": 300, "page": 128, "N": 3, "skip": "first"}
    yield Sample("many_tokens", many, dtypes=("bfloat16",))
    slots = {**base, "D": 16, "T": 40, "page": 24, "N": 200}  # more than 4096
    yield Sample("many_slots", slots, tags=edge, dtypes=("bfloat16",))
    far = {**base, "D": 16, "T": 40, "page": 8, "N": 9000}  # slots whose number takes more than 16 bits
    yield Sample("far_slots", far, tags=edge, dtypes=("bfloat16",))
    yield Sample("odd_width", {**base, "D": 21}, tags=edge)
    yield Sample("one_token", {**base, "T": 1}, tags=edge)
    yield Sample("one_page", {**base, "T": 5, "N": 1}, tags=edge)
    yield Sample("two_pages_of_two", {**base, "T": 3, "N": 2, "page": 2}, tags=edge)
    yield Sample("all_skipped", {**base, "skip": "all"}, tags=edge)
    yield Sample("no_tokens", {**base, "T": 0}, tags=edge)
    for fmt in formats("index"):
        yield Sample(
            f"glm5-{fmt}", {**GLM5, "format": fmt}, "standard", tags=frozenset({"glm5"}), dtypes=("bfloat16", "float32")
        )


def inputs(sample: Sample, dtype: str, draw: Draw) -> Inputs:
    axes = sample.axes
    D, fmt = axes["D"], FORMATS[axes["format"]]
    k = writes.rows(draw, axes["T"], D, dtype, group=fmt.group)
    if axes.get("rows") == "edges":
        k = writes.quantiser_edges(D, fmt.group, dtype)
    if axes.get("rows") == "broken":
        k = writes.broken_groups(k, fmt.group)
    slots = writes.slots(draw, len(k), axes["N"] * axes["page"], skipped=axes.get("skip", "some"))
    args = {
        "k": k,
        "slot_mapping": slots,
        "cache_format": fmt.name,
        **writes.held(draw, fmt, axes["N"], axes["page"], (D,), dtype),
    }
    return Inputs(args, {"k": (slots < 0)[:, None].expand_as(k).clone()})


def fuzz(pick: Pick) -> Sample:
    tokens, page = pick.integer(0, 40), pick.of((8, 1, 16))
    axes = {"T": tokens, "D": 128 * pick.integer(1, 3), "page": page, "skip": pick.of(("some", "none", "all"))}
    room = {"N": -(-max(tokens, 1) // page) + pick.integer(0, 3)}
    return Sample("fuzz", {**axes, **room, "format": pick.of(formats("index"))})


def cost(axes: Mapping[str, Any]) -> Cost:
    T, D = axes["T"], axes["D"]
    return Cost(flops=T * D, bytes=T * (axes["itemsize"] * D + axes["cache_row"] + 8))


SPEC = OpSpec(
    name="index_cache_write",
    group="dsa",
    reference=index_cache_write,
    args=(
        Arg("k", "T D", "F", "index keys, one head"),
        INDEX_CACHE,
        writes.SLOTS,
    ),
    scalars=INDEX_SCALARS,
    outs=(),
    mutates=("index_cache",),
    dtypes={"F": FLOATS, "C": (*FLOATS, "uint8")},
    constraints=index_constraints("k"),
    rounding="the format's: none, or e4m3 with a power-of-two scale per 128; bytes are fixed",
    attributes=("deterministic", "batch_invariant", "graph_safe"),
    samples=samples,
    inputs=inputs,
    accuracy={"index_cache": BitExact()},
    cost=cost,
    fuzz=fuzz,
    check_values=check_values,
    errors=(
        *writes.slot_errors("index_cache"),
        BadInput("quantised_width", "SHAPE", lambda args: {**args, "cache_format": "fp8_132"}),
    ),
    source="spec 4.1, 4.5, 6.2, 14.3",
)
