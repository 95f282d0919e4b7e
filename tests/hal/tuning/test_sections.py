"""Tables of a TOML file are exchanged; all else in it stays as it is, to the letter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from toys import raised

from glm5_hal.tuning.sections import parsed, replace_file, with_sections

FILE = """\
# What the vendor says of it.
source = "untuned"

[blocks.rope]  # for every chip
num_warps = 2

[arch.small]
source = "untuned"

[arch.small.rope]
num_warps = 1  # a guess

# Of the large one.
[arch.large]
source = "measured"
"""


def test_a_table_is_exchanged_and_everything_else_is_left_alone() -> None:
    text = with_sections(FILE, {("arch", "small", "rope"): {"num_warps": 8, "BLOCK": 64}})
    assert text == FILE.replace("num_warps = 1  # a guess\n", "num_warps = 8\nBLOCK = 64\n")


def test_a_table_that_is_not_there_comes_last() -> None:
    text = with_sections(FILE, {("arch", "new"): {"source": "a chip"}, ("arch", "new", "rope"): {"num_warps": 4}})
    assert text.startswith(FILE)
    assert parsed(text)["arch"]["new"] == {"source": "a chip", "rope": {"num_warps": 4}}


def test_tables_below_an_exchanged_one_stay() -> None:
    text = with_sections(FILE, {("arch", "small"): {"source": "now measured"}})
    assert parsed(text)["arch"]["small"] == {"source": "now measured", "rope": {"num_warps": 1}}


def test_the_same_again_changes_nothing() -> None:
    sections: dict[tuple[str, ...], Any] = {("arch", "new"): {"source": "x"}, ("arch", "small", "rope"): {"a": 1}}
    once = with_sections(FILE, sections)
    assert with_sections(once, sections) == once


@pytest.mark.parametrize("name", ["gfx938", "Ascend 910B1", "a.b", "9"])
@pytest.mark.parametrize("said", ['a "quoted" chip', "back\\slash", "two\nlines"])
def test_any_name_and_any_text_can_be_written(name: str, said: str) -> None:
    made = parsed(with_sections("", {("arch", name): {"source": said}}))
    assert made == {"arch": {name: {"source": said.replace("\n", "")}}}


@pytest.mark.parametrize(
    "text",
    [
        "[arch.small]\nrope = { num_warps = 1 }\n",
        "arch.small.rope.num_warps = 1\n",
        "[arch]\nsmall.rope.num_warps = 1\n",
    ],
)
def test_a_table_that_no_header_shows_is_not_guessed_at(text: str) -> None:
    problem = raised(with_sections, text, {("arch", "small", "rope"): {"num_warps": 8}})
    assert problem.code == "CONFIG"
    assert "arch.small.rope" in problem.what


def test_a_list_that_looks_like_a_header_is_none() -> None:
    text = 'floats = [\n["float32"],\n[]]\n'
    assert with_sections(text, {("arch", "a"): {"b": 1}}).startswith(text)


def test_what_is_no_toml_is_told() -> None:
    assert raised(with_sections, "[arch", {}).code == "CONFIG"


def test_a_file_is_replaced_whole_with_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "tuning.toml"
    file.write_text("old")
    file.chmod(0o640)
    replace_file(file, "new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o640)
    assert [f.name for f in tmp_path.iterdir()] == ["tuning.toml"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    file = tmp_path / "tuning.toml"
    file.write_text("old")
    monkeypatch.setattr(os, "replace", fail)
    problem = raised(replace_file, file, "new")
    assert (problem.code, file.read_text()) == ("CONFIG", "old")
    assert "disk full" in problem.what
    assert [f.name for f in tmp_path.iterdir()] == ["tuning.toml"]
