"""HalError: a code, what was wrong, the value, the fix; and the list of codes is neither too long nor too short."""

from __future__ import annotations

import ast
import pickle
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm5_hal.capability import Rejected
from glm5_hal.errors import CODES, HalError, shown, suggest
from glm5_hal.resolve import Step

ROOT = Path(__file__).resolve().parents[2]


def test_an_error_says_what_which_value_and_what_to_do() -> None:
    problem = HalError("SCALAR", "top_k is 0", value=0, fix="choose at least 1")
    assert (problem.code, problem.what, problem.value, problem.fix, problem.trace) == (
        "SCALAR",
        "top_k is 0",
        0,
        "choose at least 1",
        (),
    )
    assert str(problem) == "[SCALAR] top_k is 0\n  fix: choose at least 1"


def test_the_trace_is_in_the_text() -> None:
    step = Step("acme:native", Rejected("LIMIT", "top_k must be <= 2048, got 4096", "use top_k=2048"))
    lines = str(HalError("NO_KERNEL", "none", fix="ask", trace=[step])).splitlines()
    assert lines[1].split(maxsplit=1)[0] == "acme:native"
    assert "LIMIT  top_k must be <= 2048, got 4096  -> use top_k=2048" in lines[1]


def test_its_repr_has_code_and_fix_because_torch_compile_shows_nothing_else() -> None:
    assert repr(HalError("GRAD", "no gradient", fix="detach")) == "HalError('GRAD', 'no gradient', fix='detach')"


def test_it_crosses_process_boundaries_whole() -> None:
    step = Step("acme", Rejected("DEVICE", "elsewhere", "move it"))
    problem = HalError("NO_KERNEL", "none", value=(1, 2), fix="ask", trace=(step,))
    again = pickle.loads(pickle.dumps(problem))
    assert (again.code, again.what, again.value, again.fix, again.trace) == (
        "NO_KERNEL",
        "none",
        (1, 2),
        "ask",
        (step,),
    )
    assert str(again) == str(problem)


def test_a_code_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown HalError code 'OOPS'"):
        HalError("OOPS", "something")


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("rms_nrom", ("rms_norm", "rope"), "did you mean 'rms_norm'? known: rms_norm, rope"),
        ("zzz", ("rope", "hadamard"), "known: hadamard, rope"),
        ("zzz", (), "none are known"),
    ],
)
def test_a_suggestion_names_the_nearest_and_lists_all(name: str, known: tuple[str, ...], said: str) -> None:
    assert suggest(name, known) == said


def raises() -> Iterator[tuple[str, str]]:
    """(code, where) of every HalError made, and every constraint's, anywhere in the packages."""
    for folder in ("hal", "ops", "backends", "conformance"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                first = node.args[0] if node.args else None
                if name == "HalError" and isinstance(first, ast.Constant):
                    yield str(first.value), f"{file.relative_to(ROOT)}:{node.lineno}"
                if name == "Constraint":
                    codes = [k.value for k in node.keywords if k.arg == "code"] + node.args[3:4]
                    yield from ((str(c.value), str(file)) for c in codes if isinstance(c, ast.Constant))


def test_nothing_raises_a_code_that_is_not_listed() -> None:
    assert {(code, where) for code, where in raises() if code not in CODES} == set()


def test_every_listed_code_is_raised_somewhere() -> None:
    assert set(CODES) - {code for code, _ in raises()} == set()


def test_every_code_is_explained() -> None:
    assert all(code.isupper() and len(meaning) > 20 for code, meaning in CODES.items())


def test_an_error_never_causes_itself() -> None:
    """A walker of ``__cause__`` must come to an end."""
    import torch
    from toys import raised

    import glm5_hal

    scores = torch.zeros(2, 5)
    problem = raised(glm5_hal.ops.topk_indices, scores, torch.full((2,), 9, dtype=torch.int32), top_k=2)
    assert problem.code == "VALUE"
    assert problem.__cause__ is None
    assert "[VALUE]" in "".join(traceback.format_exception(problem))


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def test_any_value_can_be_shown_in_a_message() -> None:
    assert shown("x") == "'x'"
    assert shown([1] * 1000) == f"[{'1, ' * 26}1..."
    assert shown(Unspeakable()) == "a value of type Unspeakable"
    assert shown(10**5000) == "a value of type int"
