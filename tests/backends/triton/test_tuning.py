"""Tuning is data: a chip is added, or tuned, without touching a kernel."""

from pathlib import Path

import pytest

from glm5_hal.backends._triton.tuning import CONSERVATIVE, Tuning, tuning
from glm5_hal.errors import HalError

VENDOR = """
source = "measured on a chip"
[limits]
floats = ["float32", "bfloat16"]
int64 = false
[blocks]
rms_norm = { num_warps = 2 }
mla_decode = { BLOCK_N = 64 }
[arch.large]
source = "measured on a large chip"
rms_norm = { num_warps = 16 }
mla_decode = { BLOCK_N = 128 }
limits = { fp8 = true }
"""


@pytest.fixture
def vendor(tmp_path: Path) -> Path:
    file = tmp_path / "tuning.toml"
    file.write_text(VENDOR)
    return file


def test_a_chip_that_nobody_measured_gets_one_conservative_choice_and_says_so() -> None:
    assert tuning("any").source == "untuned"
    assert tuning("any")["rms_norm"]["num_warps"] == 8


def test_a_vendors_file_goes_over_it(vendor: Path) -> None:
    found = tuning("small", vendor)
    assert (found.source, found["rms_norm"]["num_warps"]) == ("measured on a chip", 2)
    assert (found.floats, found.int64) == (("float32", "bfloat16"), False)


def test_and_what_it_says_of_one_architecture_over_that(vendor: Path) -> None:
    found = tuning("large", vendor)
    assert (found.source, found["rms_norm"]["num_warps"]) == ("measured on a large chip", 16)
    assert (found.floats, found.int64, found.fp8) == (("float32", "bfloat16"), False, True)


def test_sizes_that_were_measured_are_not_for_products_of_wide_numbers(vendor: Path) -> None:
    """They would not fit: what holds for every chip of the vendor does."""
    found = tuning("large", vendor)
    assert [found.products("mla_decode", width)["BLOCK_N"] for width in (1, 2, 4)] == [128, 128, 64]


@pytest.mark.parametrize(
    ("text", "named", "fix"),
    [
        ("[blocks.rmsnorm]\nnum_warps = 1", "rmsnorm", "rms_norm"),
        ("[blocks.rms_norm]\nwarps = 1", "warps", "num_warps"),
        ("[limits]\nfp4 = true", "fp4", ""),
        ("[arch.any.norm]\nnum_warps = 1", "norm", ""),
    ],
)
def test_a_name_that_nothing_reads_is_an_error_with_the_nearest_one(
    tmp_path: Path, text: str, named: str, fix: str
) -> None:
    file = tmp_path / "tuning.toml"
    file.write_text(text)
    with pytest.raises(HalError) as problem:
        tuning("any", file)
    assert named in problem.value.what
    assert str(file) in problem.value.what
    assert fix in problem.value.fix


@pytest.mark.parametrize("text", ["[blocks", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str | bytes) -> None:
    file = tmp_path / "tuning.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(HalError, match=r"tuning\.toml"):
        tuning("any", file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HalError, match="absent"):
        tuning("any", tmp_path / "absent.toml")


def test_the_conservative_file_holds_every_key_that_there_is() -> None:
    assert isinstance(tuning("any", CONSERVATIVE), Tuning)
