"""Paged caches in plain torch: the bytes that are written, all others untouched, and the numbers that are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judging import NeverWaits, arguments, passes, points, run, same_bits

from glm5_hal.backend import Kernel
from glm5_hal.backends._torch.caches import Tiles, index_cache_write, mla_cache_write
from glm5_hal.formats import FORMATS, formats
from glm5_hal.ops._common import caches as bytes_of
from glm5_hal.ops._common.references import reference_of
from glm5_hal.spec import Sample

WRITERS = (mla_cache_write, index_cache_write)


@points(*WRITERS)
def test_the_same_bytes_as_the_reference(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@points(*WRITERS)
@pytest.mark.usefixtures("far_device")
def test_the_same_bytes_where_the_host_cannot_look_at_the_slots(kernel: Kernel, sample: Sample, dtype: str) -> None:
    passes(kernel, sample, dtype)


@pytest.mark.parametrize("form", formats("latent"))
@pytest.mark.usefixtures("far_device")
def test_the_host_never_waits(form: str) -> None:
    args = arguments("mla_cache_write", f"rows-{form}")
    with NeverWaits():
        mla_cache_write.fn(**args)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("wanted", ["none", "the first", "the last", "slot 0 alone", "slot 0 among others"])
@pytest.mark.parametrize("form", formats("latent"))
def test_skipped_tokens_write_nothing(request: pytest.FixtureRequest, form: str, wanted: str, far: bool) -> None:
    """-1 must not become the last slot, slot 0 or anyone else's, whichever tokens are skipped."""
    if far:
        request.getfixturevalue("far_device")
    args = arguments("mla_cache_write", f"rows-{form}")
    T = len(args["slot_mapping"])
    slots = torch.full((T,), -1)
    if wanted == "the first":
        slots[0] = 9
    elif wanted == "the last":
        slots[-1] = 9
    elif wanted == "slot 0 alone":
        slots[4] = 0
    elif wanted == "slot 0 among others":
        slots[2:8:2] = torch.tensor([31, 0, 7])
    args["slot_mapping"] = slots
    got, plain = run(mla_cache_write, args), {**args, **copies(args)}
    reference_of("mla_cache_write")(**plain)
    assert same_bits(got, {k: plain[k] for k in got})


def copies(args: dict[str, Any]) -> dict[str, Any]:
    return {k: args[k].clone() for k in ("kv_cache", "rope_cache") if args[k] is not None}


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("gap", [1, 132, 7 * 132])
@pytest.mark.parametrize("page", [3, 8, 32])
def test_block_major_pages_any_distance_apart(request: pytest.FixtureRequest, page: int, gap: int, far: bool) -> None:
    if far:
        request.getfixturevalue("far_device")
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(7, 128, generator=generator)
    slots = torch.tensor([4, -1, 11, 0, 5, -1, 2])
    whole = torch.full((4, page, 132), 0x4D, dtype=torch.uint8)
    memory = torch.full((4 * (page * 132 + gap),), 0x4D, dtype=torch.uint8)
    apart = memory.as_strided(whole.shape, (page * 132 + gap, 132, 1))
    reference_of("index_cache_write")(k, whole, slots, cache_format="fp8_132")
    index_cache_write.fn(k, apart, slots, cache_format="fp8_132")
    assert torch.equal(apart, whole)
    assert int((memory != 0x4D).sum()) == int((whole != 0x4D).sum())


def test_nothing_to_write_or_nowhere() -> None:
    rows = torch.randn(3, 8)
    skipped = torch.full((3,), -1)
    index_cache_write.fn(rows, torch.zeros(0, 4, 8), skipped)
    index_cache_write.fn(rows[:0], torch.zeros(2, 4, 8), skipped[:0])


# --- reading ---------------------------------------------------------------------------------------------------------


def filled(form: str, page: int, latent: int, rope: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    fmt = FORMATS[form]
    held = fmt.allocate(5, page, *((latent, rope) if fmt.kind == "latent" else (latent,)), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** torch.arange(-8, 5 * page - 8)[:, None].clamp(-30, 30)
    rows = torch.randn(5 * page, latent, generator=generator) * sizes
    pe = torch.randn(5 * page, rope, generator=generator).to(dtype) if fmt.kind == "latent" else None
    bytes_of.write(fmt, held, torch.arange(5 * page), rows.to(dtype), pe)
    return held


@pytest.mark.parametrize("page", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", [*formats("latent"), *formats("index")])
def test_rows_read_as_the_numbers_that_the_format_says(form: str, dtype: torch.dtype, page: int) -> None:
    fmt, rope = FORMATS[form], 6 if FORMATS[form].kind == "latent" else 0
    held, pages = filled(form, page, 256, rope, dtype), torch.tensor([4, 1, 3], dtype=torch.int32)
    tiles = Tiles(fmt, held, 256, rope, torch.float32, 3 * page)
    slots = (pages.long()[:, None] * page + torch.arange(page)).flatten()
    latent, pe = bytes_of.read(fmt, held, slots, 256)
    expected = latent if pe is None else torch.cat([latent, pe], -1)
    assert torch.equal(tiles.between(pages, 0, 3 * page), expected)
    assert torch.equal(tiles.between(pages, page // 2, 2 * page + 1), expected[page // 2 : 2 * page + 1])
    chosen = torch.tensor([3 * page - 1, 0, page], dtype=torch.int32)
    assert torch.equal(tiles.at(pages, chosen), expected[chosen.long()])


@pytest.mark.parametrize("scale", [2.0**-22, 1.0, 3.7, 2.0**120])
def test_every_e4m3_code(scale: float) -> None:
    """NaN codes too; and no scale overflows on the way to a number that fits."""
    codes = torch.arange(256, dtype=torch.uint8)
    cache = torch.cat([codes, torch.tensor([scale, scale]).view(torch.uint8)]).view(1, 1, 264)
    tiles = Tiles(FORMATS["fp8_132"], (cache,), 256, 0, torch.float32, 1)
    expected = codes.view(torch.float8_e4m3fn).float() * scale
    assert torch.equal(
        tiles.between(torch.zeros(1, dtype=torch.int32), 0, 1)[0].nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0)
    )
    assert int(expected.isnan().sum()) == 2
