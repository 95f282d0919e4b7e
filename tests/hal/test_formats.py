"""Cache formats: sizes as published, dims that fit, a backend's favourite first."""

from __future__ import annotations

import pytest
import torch
from toys import installed, raised, stand_in

from glm5_hal import cache_format, preferred_formats
from glm5_hal.formats import FORMATS, formats
from glm5_hal.plugins import PluginRecord

MLA, INDEX = (512, 64), (128,)


@pytest.mark.parametrize(
    ("name", "dims", "widths", "bytes_per_token"),
    [
        ("latent_576", MLA, (576,), 1152),
        ("latent_512_rope_64", MLA, (512, 64), 1152),
        ("fp8_656", MLA, (656,), 656),
        ("fp8_656_ascend", MLA, (656,), 656),
        ("bf16_128", INDEX, (128,), 256),
        ("fp8_132", INDEX, (132,), 132),
    ],
)
def test_the_formats_have_their_published_sizes(
    name: str, dims: tuple[int, ...], widths: tuple[int, ...], bytes_per_token: int
) -> None:
    fmt = cache_format(name)
    assert fmt.widths(*dims) == widths
    assert fmt.bytes_per_token(*dims) == bytes_per_token
    pages = fmt.allocate(3, 8, *dims, dtype=torch.bfloat16)
    assert sum(t.numel() * t.itemsize for t in pages) == 3 * 8 * bytes_per_token
    assert [tuple(t.shape) for t in pages] == [(3, 8, w) for w in widths]
    assert len(pages) == len(fmt.tensors)
    assert not any(t.any() for t in pages)


def test_every_format_is_listed_by_its_kind() -> None:
    assert {*formats("latent"), *formats("index")} == set(FORMATS)
    assert formats("nothing") == ()


def test_a_cache_is_in_the_activations_dtype_unless_the_format_says_otherwise() -> None:
    for dtype in (torch.float32, torch.float16):
        (plain,) = cache_format("latent_576").allocate(1, 2, *MLA, dtype=dtype)
        (packed,) = cache_format("fp8_656").allocate(1, 2, *MLA, dtype=dtype)
        assert (plain.dtype, packed.dtype) == (dtype, torch.uint8)
    assert cache_format("latent_576").bytes_per_token(*MLA, itemsize=4) == 2304
    assert cache_format("fp8_656").bytes_per_token(*MLA, itemsize=4) == 656
    assert cache_format("bf16_128").allocate(1, 2, 128, dtype=torch.float32, device="meta")[0].is_meta


def test_a_format_that_does_not_exist() -> None:
    problem = raised(cache_format, "fp8_655")
    assert (problem.code, problem.value) == ("UNKNOWN", "fp8_655")
    assert "did you mean 'fp8_656'?" in problem.fix


@pytest.mark.parametrize(
    ("name", "dims", "words"),
    [
        ("latent_576", (512,), "takes the dims (kv_lora_rank, rope_dim), got (512,)"),
        ("fp8_132", MLA, "takes the dims (index_head_dim), got (512, 64)"),
        ("fp8_656", (500, 64), "groups of 128; 500 is not a multiple"),
    ],
)
def test_dims_that_a_format_cannot_have(name: str, dims: tuple[int, ...], words: str) -> None:
    for method in (cache_format(name).widths, cache_format(name).bytes_per_token):
        problem = raised(method, *dims)
        assert problem.code == "SHAPE"
        assert words in problem.what


def test_a_backends_favourite_comes_first() -> None:
    formats = {"latent": ("fp8_656", "latent_576"), "index": ("fp8_132",)}
    broken = PluginRecord("bad", "m", "d", "1", False, "broken", "IMPORT", "no sdk", "install it")
    with installed(stand_in("acme", cache_formats=formats), stand_in("plain"), broken):
        assert [f.name for f in preferred_formats("acme", "latent")] == ["fp8_656", "latent_576"]
        assert [f.name for f in preferred_formats("plain", "index")] == ["bf16_128"]
        assert preferred_formats("acme", "other") == ()
        assert raised(preferred_formats, "acmee", "latent").code == "UNKNOWN"
        problem = raised(preferred_formats, "bad", "latent")
        assert (problem.code, problem.fix) == ("PLUGIN", "install it")
