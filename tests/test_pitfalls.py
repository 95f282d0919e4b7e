"""The table of pitfalls is whole, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "docs/pitfalls.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|$", TABLE, re.MULTILINE)


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_all_twenty_five_are_there() -> None:
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 26))


def test_each_is_covered_or_says_who_will() -> None:
    for number, _, cover in ROWS:
        assert "`tests/" in cover or "later (" in cover or "the check `" in cover, number


def test_every_named_test_exists() -> None:
    named = re.findall(r"`(tests/[^:`]+)::([^`]+)`", TABLE)
    assert named
    missing = []
    for path, name in named:
        file = ROOT / path
        if not file.exists() or (name not in names_in(file) and not (name == "*" and names_in(file))):
            missing.append(f"{path}::{name}")
    assert not missing
