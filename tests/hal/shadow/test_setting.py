"""What GLM5_SHADOW may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm5_hal.errors import HalError
from glm5_hal.policy import from_environment
from glm5_hal.shadow import FILE, parse


def test_off_is_the_default() -> None:
    assert from_environment({}).shadow.rules == ()
    assert parse("off", "t").rules == parse("  ", "t").rules == ()


def test_the_first_glob_that_matches_gives_the_rate(tmp_path: Path) -> None:
    found = parse(f"topk_*:0.5, *:0.01 ; file = {tmp_path}/x.jsonl", "t")
    assert (found.rate("topk_indices"), found.rate("rope")) == (0.5, 0.01)
    assert found.file == str(tmp_path / "x.jsonl")
    assert parse("rope:1", "t").rate("hadamard") == 0.0
    assert parse("rope:1", "t").file == str(Path.cwd() / FILE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("topk_*", "is no rule"),
        ("topk_*:0", "is no rule"),
        ("topk_*:1.5", "is no rule"),
        ("topk_*:nan", "is no rule"),
        (":0.5", "is no rule"),
        ("rope:0.5,", "is no rule"),
        ("rope:0.5;path=x", "is no option"),
        ("rope:0.5;file=", "is no option"),
        ("rope:0.5;file=/no/such/folder/x", "cannot be a file"),
    ],
)
def test_what_is_not_of_this_form_is_refused_with_the_form(text: str, words: str) -> None:
    with pytest.raises(HalError) as caught:
        from_environment({"GLM5_SHADOW": text})
    assert caught.value.code == "CONFIG"
    assert words in caught.value.what
    assert caught.value.fix


def test_a_glob_that_no_op_matches_is_refused_with_the_nearest_op() -> None:
    with pytest.raises(HalError) as caught:
        parse("topk_index:0.5", "t")
    assert (caught.value.code, caught.value.value) == ("UNKNOWN", "topk_index")
    assert "topk_indices" in caught.value.fix
