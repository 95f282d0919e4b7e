"""What GLM5_SHADOW may say."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("variable", ["GLM5_SHADOW", "GLM5_LOG"])
def test_a_file_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """By asking: a folder's mode would not stop root."""
    file, full = tmp_path / "new.jsonl", tmp_path / "full.jsonl"
    full.touch()
    closed = [tmp_path]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed)
    spelled = {"GLM5_SHADOW": "rope:1;file={}", "GLM5_LOG": "jsonl:{}"}[variable]
    with pytest.raises(HalError, match="cannot be written") as caught:
        from_environment({variable: spelled.format(file)})
    assert caught.value.code == "CONFIG"
    from_environment({variable: spelled.format(full)})  # what is there already needs no leave to be made
    closed = [full]
    with pytest.raises(HalError, match="cannot be written"):
        from_environment({variable: spelled.format(full)})
