"""mla_cache_write against bytes packed by hand: e4m3 and bfloat16 from their definitions, fields with struct."""

from __future__ import annotations

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
from glm5_hal.ops._mla_cache_write import SPEC
from glm5_hal.spec import Sample

SMOKE = [s for s in SPEC.samples() if s.level == "smoke"]
write = reference_of("mla_cache_write")


def e4m3(x: float) -> int:
    """To nearest, ties to even, saturating: 4 exponent bits of bias 7, 3 of mantissa, no infinity, largest 448."""
    sign = 0x80 if math.copysign(1.0, x) < 0 else 0
    a = abs(x)
    if a < 2.0**-6:  # subnormal: steps of 2^-9
        return sign | round(a * 512)
    mantissa, exponent = math.frexp(a)  # a = mantissa · 2^exponent, mantissa in [1/2, 1)
    return sign | min((exponent + 6) * 8 + round((2 * mantissa - 1) * 8), 0x7E)


def bfloat16(x: float) -> bytes:
    """The upper half of the float32, to nearest, ties to even; infinity stays."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def scale_of(group: Sequence[float]) -> float:
    """The smallest power of two that brings the group within 448, at least 1e-4."""
    scale = 2.0**-40
    while max(map(abs, group)) > 448 * scale or scale < 1e-4:
        scale *= 2
    return scale


def packed(latent: Sequence[float], rope: Sequence[float], order: Sequence[str]) -> bytes:
    codes, scales = b"", b""
    for start in range(0, len(latent), 128):
        group = latent[start : start + 128]
        broken = not all(map(math.isfinite, group))
        scale = 1.0 if broken else scale_of(group)
        codes += bytes(0x7F if broken else e4m3(x / scale) for x in group)
        scales += struct.pack("<f", scale)
    fields = {"latent": codes, "scale": scales, "rope": b"".join(map(bfloat16, rope))}
    return b"".join(fields[name] for name in order)


ORDER = {"fp8_656": ("latent", "scale", "rope"), "fp8_656_ascend": ("latent", "rope", "scale")}


def by_hand(args: dict[str, Any]) -> dict[str, Tensor]:
    """What the cache holds afterwards: a copy in which each token's slot is replaced, by numbers or by bytes."""
    after = {n: args[n].clone() for n in ("kv_cache", "rope_cache") if args[n] is not None}
    page = args["kv_cache"].shape[1]
    for t, slot in enumerate(args["slot_mapping"].tolist()):
        if slot == -1:
            continue
        latent, rope = args["kv_c"][t], args["k_pe"][t]
        where = (slot // page, slot % page)
        if args["cache_format"] == "latent_576":
            after["kv_cache"][where] = torch.cat([latent, rope])
        elif args["cache_format"] == "latent_512_rope_64":
            after["kv_cache"][where], after["rope_cache"][where] = latent, rope
        else:
            row = packed(latent.tolist(), rope.tolist(), ORDER[args["cache_format"]])
            after["kv_cache"][where] = torch.tensor(list(row), dtype=torch.uint8)
    return after


def written(args: dict[str, Any]) -> dict[str, Tensor]:
    own = {n: args[n].clone() for n in ("kv_cache", "rope_cache") if args[n] is not None}
    assert write(**{**args, **own}) is None
    return own


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("sample", SMOKE, ids=lambda s: s.id)
def test_every_byte_is_where_and_what_the_format_says(sample: Sample, dtype: str) -> None:
    args = dict(SPEC.inputs(sample, dtype, Draw(0, sample.id)).args)
    got, expected = written(args), by_hand(args)
    for name, tensor in expected.items():
        assert same_bits(got[name], tensor), name


def one(latent: Sequence[float], rope: Sequence[float] = (0.0, 0.0), cache_format: str = "fp8_656") -> bytes:
    """The bytes of one token's slot, of a latent of one group that is padded with zeros."""
    kv_c = torch.tensor([[*latent, *[0.0] * (128 - len(latent))]])
    cache = torch.zeros(1, 1, 128 + 4 + 2 * len(rope), dtype=torch.uint8)
    write(kv_c, torch.tensor([list(rope)]), cache, torch.tensor([0]), cache_format=cache_format)
    return bytes(cache.flatten().tolist())


def test_codes_are_e4m3() -> None:
    """At scale 1 (a maximum of 448): powers of two, the extremes, ties to the even code, below the smallest."""
    row = one([448.0, 1.0, -1.0, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 17.0, 19.0, 17.001, -0.0, 0.0])
    assert row[:11].hex() == "7e38b801000258" + "5a59" + "8000"
    assert row[128:132] == struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("largest", "scale"),
    [
        (448.0, 1.0),
        (448.00003, 2.0),
        (224.0, 0.5),
        (224.00002, 1.0),
        (1.0, 2.0**-8),
        (2.0**-13 * 448, 2.0**-13),
        (1e-4, 2.0**-13),
        (1e-30, 2.0**-13),
        (0.0, 2.0**-13),
        (3.4e38, 2.0**120),
    ],
)
def test_scales_are_powers_of_two_with_a_floor(largest: float, scale: float) -> None:
    """Pitfall 11: the smallest power of two that avoids saturation, but never below 1e-4 (as a power of two: 2^-13)."""
    assert struct.unpack("<f", one([largest])[128:132]) == (scale,)


def test_no_finite_value_becomes_nan_and_large_ones_keep_their_size() -> None:
    """Pitfall 11."""
    largest = torch.finfo(torch.float32).max
    row = one([largest, -largest, largest / 2])
    assert 0x7F not in {b & 0x7F for b in row[:128]}
    assert row[0] - row[2] == 8  # half as large is one exponent less
    assert row[1] == row[0] | 0x80


def test_a_group_with_a_nan_or_an_infinity_reads_back_as_nan_and_its_neighbour_does_not() -> None:
    for value in (math.nan, math.inf, -math.inf):
        kv_c = torch.ones(1, 256)
        kv_c[0, 7] = value
        cache = torch.zeros(1, 1, 256 + 8 + 4, dtype=torch.uint8)
        write(kv_c, torch.tensor([[math.inf, 1.0]]), cache, torch.tensor([0]), cache_format="fp8_656")
        row = bytes(cache.flatten().tolist())
        assert row[:128] == b"\x7f" * 128
        assert row[128:256] == bytes([e4m3(256.0)]) * 128
        assert struct.unpack("<2f", row[256:264]) == (1.0, 2.0**-8)
        assert row[264:] == b"\x80\x7f\x80\x3f"


def test_rope_is_rounded_to_bfloat16_to_nearest_even() -> None:
    row = one([1.0], rope=[1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    assert row[132:].hex(" ", 2) == "803f 803f 823f 813f"


def test_the_two_656_byte_formats_hold_the_same_fields_in_another_order() -> None:
    """Pitfall 13: per token latent, scales, rope; the other has rope before the scales."""
    latent, rope = [3.0, -5.0, 0.25], [1.5, -2.5]
    a, b = one(latent, rope, "fp8_656"), one(latent, rope, "fp8_656_ascend")
    assert (a[:128], a[128:132], a[132:]) == (b[:128], b[132:], b[128:132])


def test_glm5_tokens_take_656_bytes() -> None:
    cache = torch.zeros(2, 64, 656, dtype=torch.uint8)
    write(torch.ones(1, 512), torch.full((1, 64), 2.0), cache, torch.tensor([64 + 5]), cache_format="fp8_656")
    row = bytes(cache[1, 5].tolist())
    assert row[:512] == bytes([e4m3(256.0)]) * 512
    assert row[512:528] == struct.pack("<4f", *[2.0**-8] * 4)
    assert row[528:] == b"\x00\x40" * 64
    cache[1, 5] = 0
    assert not cache.any()


def test_a_skipped_token_leaves_even_the_last_slot_alone() -> None:
    """-1 would be the last slot, were it taken for an index."""
    cache = torch.full((2, 4, 3), 9.0)
    write(torch.ones(3, 2), torch.ones(3, 1), cache, torch.tensor([-1, 2, -1]))
    assert cache[0, 2].tolist() == [1.0] * 3
    cache[0, 2] = 9.0
    assert (cache == 9.0).all()


def test_of_two_tokens_with_one_slot_one_is_stored_whole() -> None:
    cache = torch.zeros(1, 2, 3)
    write(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[1.0], [2.0]]), cache, torch.tensor([1, 1]))
    assert cache[0, 1].tolist() in ([1.0] * 3, [2.0] * 3)


def test_what_skipped_tokens_hold_does_not_matter() -> None:
    for sample in SMOKE:
        made = SPEC.inputs(sample, "float32", Draw(0, sample.id))
        poisoned = {**made.args, **{n: made.args[n].masked_fill(m, math.nan) for n, m in made.poison.items()}}
        for name, tensor in written(dict(made.args)).items():
            assert same_bits(tensor, written(poisoned)[name]), sample.id


def test_mla_decode_reads_what_was_written() -> None:
    """One key alone is the output: the stored latent, within half a step of e4m3 where it is quantised."""
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    for cache_format, step in (("latent_576", 0.0), ("fp8_656", 2.0**-4), ("fp8_656_ascend", 2.0**-4)):
        quantised = step > 0
        cache = torch.zeros(
            3, 2, 256 + (8 + 32 if quantised else 16), dtype=torch.uint8 if quantised else torch.float32
        )
        slots = torch.tensor([3, 0, 5, 2, 1])
        write(x, torch.zeros(5, 16), cache, slots, cache_format=cache_format)
        for t in range(5):
            out, _ = reference_of("mla_decode")(
                torch.zeros(1, 1, 272),
                cache.view(6, 1, -1),  # pages of one slot, so that each token is a request of its own
                slots[t : t + 1, None].int(),
                torch.ones(1, dtype=torch.int32),
                torch.tensor([0, 1], dtype=torch.int32),
                scale=1.0,
                kv_lora_rank=256,
                cache_format=cache_format,
            )
            error = (out[0, 0] - x[t]).abs()
            assert (error <= step * x[t].abs() + (2.0**-10 * 2.0**-6 if quantised else 0.0)).all()


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
    assert refusal.value.value == slot
