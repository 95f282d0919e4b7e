"""index_cache_write against a page's bytes, with the nearest e4m3 number found by looking at all of them."""

from __future__ import annotations

import bisect
import math
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops._common.references import reference_of
from glm5_hal.ops._index_cache_write import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
write = reference_of("index_cache_write")


def magnitude(code: int) -> float:
    exponent, mantissa = divmod(code, 8)
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


#: Every e4m3 magnitude, 0 to 448, by code.
MAGNITUDES = [magnitude(code) for code in range(0x7F)]


def e4m3(x: float) -> int:
    a = min(abs(x), 448.0)
    above = min(bisect.bisect_left(MAGNITUDES, a), 0x7E)
    nearest = min((max(above - 1, 0), above), key=lambda code: (abs(MAGNITUDES[code] - a), code % 2))
    return nearest | (0x80 if math.copysign(1.0, x) < 0 else 0)


def by_hand(args: dict[str, Any]) -> Tensor:
    cache, k = args["index_cache"], args["k"]
    page, D = cache.shape[1], k.shape[1]
    if args["cache_format"] == "bf16_128":
        after = cache.clone()
        for t, slot in enumerate(args["slot_mapping"].tolist()):
            if slot >= 0:
                after[slot // page, slot % page] = k[t]
        return after
    pages = [bytearray(p.flatten().tolist()) for p in cache]
    for t, slot in enumerate(args["slot_mapping"].tolist()):
        if slot < 0:
            continue
        held, at = pages[slot // page], slot % page
        for g in range(D // 128):
            group = k[t, 128 * g : 128 * g + 128].tolist()
            scale = scale_of(group)
            codes = bytes(0x7F if scale is None else e4m3(x / scale) for x in group)
            held[at * D + 128 * g : at * D + 128 * g + 128] = codes
            start = page * D + at * (D // 32) + 4 * g
            held[start : start + 4] = struct.pack("<f", 1.0 if scale is None else scale)
    return torch.tensor([list(p) for p in pages], dtype=torch.uint8).view_as(cache)


def scale_of(group: Sequence[float]) -> float | None:
    """2^ceil(log2(max(amax, 1e-4) / 448)), found by counting; None where the group is not finite."""
    if not all(math.isfinite(x) for x in group):
        return None
    amax = max(1e-4, *map(abs, group))
    return next(2.0**e for e in range(-60, 130) if amax <= 448 * 2.0**e)


def written(args: dict[str, Any]) -> Tensor:
    cache = args["index_cache"].clone()
    assert write(**{**args, "index_cache": cache}) is None
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_every_byte_is_where_and_what_the_format_says(sample: Sample, dtype: str) -> None:
    args = dict(SPEC.inputs(sample, dtype, Draw(0, sample.id)).args)
    got, expected = written(args), by_hand(args)
    assert got.dtype == expected.dtype
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_a_page_is_all_codes_then_all_scales() -> None:
    """Pitfall 13: the shape [64, 132] suggests 132 bytes per token; it is 64 · 128 bytes, then 64 · 4."""
    cache = torch.zeros(2, 64, 132, dtype=torch.uint8)
    write(torch.full((1, 128), 3.0), cache, torch.tensor([64 + 5]), cache_format="fp8_132")
    page = bytes(cache[1].flatten().tolist())
    assert page[5 * 128 : 6 * 128] == bytes([e4m3(384.0)]) * 128
    assert page[64 * 128 + 5 * 4 : 64 * 128 + 6 * 4] == struct.pack("<f", 2.0**-7)
    assert sum(b != 0 for b in page) == 128 + 1  # 2^-7 is 00 00 00 3c
    assert not cache[0].any()


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(448.0, 1.0), (449.0, 2.0), (1.0, 2.0**-8), (1e-4, 2.0**-22), (1e-6, 2.0**-22), (0.0, 2.0**-22)],
)
def test_the_floor_is_on_the_maximum(largest: float, scale: float) -> None:
    """Pitfall 11: 1e-4 bounds the largest magnitude, not the scale, so small keys keep their bits; 1e-4/448 → 2^-22."""
    cache = torch.zeros(1, 1, 132, dtype=torch.uint8)
    write(torch.full((1, 128), largest), cache, torch.tensor([0]), cache_format="fp8_132")
    assert struct.unpack("<f", bytes(cache[0, 0, 128:].tolist())) == (scale,)


def test_the_two_fp8_formats_differ_in_their_floor() -> None:
    """The same small values: a handful of codes in the latent cache, well resolved in the index cache."""
    x = torch.linspace(1e-7, 1e-6, 128)[None]
    index, latent = torch.zeros(1, 1, 132, dtype=torch.uint8), torch.zeros(1, 1, 136, dtype=torch.uint8)
    write(x, index, torch.tensor([0]), cache_format="fp8_132")
    reference_of("mla_cache_write")(x, torch.zeros(1, 2), latent, torch.tensor([0]), cache_format="fp8_656")
    assert len(index[0, 0, :128].unique()) > 20
    assert set(latent[0, 0, :128].tolist()) <= {0, 1, 2, 3, 4}


def test_a_skipped_token_leaves_even_the_last_slot_alone() -> None:
    for cache_format, width, dtype in (("bf16_128", 128, torch.float32), ("fp8_132", 132, torch.uint8)):
        cache = torch.full((2, 4, width), 9, dtype=dtype)
        write(torch.ones(2, 128), cache, torch.tensor([-1, -1]), cache_format=cache_format)
        assert (cache == 9).all()


def test_what_skipped_tokens_hold_does_not_matter() -> None:
    for sample in SMOKE:
        made = SPEC.inputs(sample, "float32", Draw(0, sample.id))
        poisoned = {**made.args, "k": made.args["k"].masked_fill(made.poison["k"], math.nan)}
        assert torch.equal(written(dict(made.args)).view(torch.uint8), written(poisoned).view(torch.uint8)), sample.id


def test_indexer_logits_reads_what_was_written() -> None:
    """With powers of two nothing is rounded, so a score is the plain dot product, whatever the format."""
    k = 2.0 ** torch.randint(-3, 3, (5, 128), generator=torch.Generator().manual_seed(0)).float()
    slots = torch.tensor([9, 0, 4, 7, 2])
    for cache_format, width, dtype in (("bf16_128", 128, torch.float32), ("fp8_132", 132, torch.uint8)):
        cache = torch.zeros(3, 4, width, dtype=dtype)
        write(k, cache, slots, cache_format=cache_format)
        for t in range(5):
            logits = reference_of("indexer_logits")(
                torch.ones(1, 1, 128),
                torch.ones(1, 1),
                cache,
                (slots[t : t + 1, None] // 4).int(),
                slots[t : t + 1].int() % 4 + 1,
                torch.tensor([0, 1], dtype=torch.int32),
                max_seq_len=4,
                cache_format=cache_format,
            )
            assert logits[0, slots[t] % 4] == k[t].sum()


@pytest.mark.parametrize(("slot", "ok"), [(-2, False), (-1, True), (31, True), (32, False)])
def test_slots_are_checked(slot: int, ok: bool) -> None:
    args = dict(SPEC.inputs(SMOKE[0], "float32", Draw(0, "x")).args)
    args["slot_mapping"] = torch.full_like(args["slot_mapping"], slot)
    if ok:
        SPEC.check_values(args)
        return
    with pytest.raises(HalError, match="slot_mapping") as refusal:
        SPEC.check_values(args)
    assert refusal.value.code == "VALUE"
