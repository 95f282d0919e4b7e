"""Mutation operators: what they change, and what they leave alone."""

from __future__ import annotations

from typing import Any

import pytest

from glm5_hal.conformance.mutants.operators import OPERATORS, mutated, mutations


def changes(source: str, operator: str) -> list[str]:
    return [m.after for m in mutations(source) if m.operator == operator]


def body(statement: str) -> str:
    return f"def f(x, y, i, n):\n    {statement}\n"


@pytest.mark.parametrize(
    ("operator", "statement", "after"),
    [
        ("compare", "return x < y", ["return x <= y"]),
        ("arithmetic", "return x + y", ["return x - y"]),
        ("arithmetic", "return -x", ["return x"]),
        ("constant", "return 3", ["return 4", "return 2"]),
        ("constant", "return True", ["return False"]),
        ("constant", "return 0.5", ["return 0.75"]),
        ("index", "return x[i:n]", ["return x[:n]", "return x[i:]"]),
        ("index", "return x[i]", ["return x[i - 1]"]),
        ("name", "return x.amax(y)", ["return x.amin(y)"]),
        ("dtype", "return torch.float32", ["return torch.bfloat16"]),
        ("branch", "return x if i else y", ["return y if i else x"]),
        ("branch", "return x and y", ["return x or y"]),
        ("arguments", "return g(x, y)", ["return g(y, x)"]),
        ("drop", "x += 1", ["pass"]),
        ("drop", "g(x)", ["pass"]),
        ("drop", "x = y", ["pass"]),
    ],
)
def test_an_operator_changes_a_statement(operator: str, statement: str, after: list[str]) -> None:
    assert changes(body(statement), operator) == after


def test_every_operator_has_an_example_above() -> None:
    (mark,) = test_an_operator_changes_a_statement.pytestmark  # type: ignore[attr-defined]
    assert {row[0] for row in mark.args[1]} == {*OPERATORS, "drop"}


def test_arguments_are_not_swapped_where_that_cannot_matter() -> None:
    assert changes(body("return max(x, y)"), "arguments") == []


def test_a_condition_becomes_true_and_false() -> None:
    source = "def f(x):\n    if x:\n        return 1\n    return 0\n"
    assert changes(source, "branch") == ["if True:", "if False:"]


@pytest.mark.parametrize(
    "source",
    [
        "LIMIT = 3\n",
        "@g(1)\ndef f(x: int = 1) -> 'a < b':\n    '''One + one.'''\n",
        "def f(x):\n    y = g(x)\n    return y\n",  # without the first statement there is no y
    ],
)
def test_what_is_no_behaviour_or_cannot_matter_is_left_alone(source: str) -> None:
    assert list(mutations(source)) == []


def test_a_mutated_module_differs_in_one_place() -> None:
    source = body("return x + y") + "\n\nclass C:\n    def g(self, x):\n        return x < 1\n"
    (changed,) = (m for m in mutations(source) if m.operator == "compare")
    assert (changed.function, changed.line, changed.column) == ("C.g", 7, 15)
    names: dict[str, Any] = {}
    exec(mutated(source, changed, "a.py"), names)
    assert names["C"]().g(1)
    assert names["f"](1, 2, 0, 0) == 3


def test_mutations_come_in_the_same_order_every_time() -> None:
    source = body("return x[i:n] + y * 2 < 1")
    assert [m.after for m in mutations(source)] == [m.after for m in mutations(source)]
