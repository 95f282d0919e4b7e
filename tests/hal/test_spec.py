"""The declaration of an op: one that contradicts itself cannot be made; what is derived from it agrees with it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from torch import Tensor
from toys import CROWD, PAIR, PIPE, WRITE, raised

from glm5_hal.spec import Arg, BitExact, OpSpec, Sample, Scalar


def changed(spec: OpSpec, **changes: Any) -> OpSpec:
    return dataclasses.replace(spec, **changes)


def other_signature(x: Tensor, z: Tensor | None = None, *, k: int = 1, mode: str = "", flag: bool = False) -> Tensor:
    return x


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": other_signature}, "signature has"),
        ({"args": PAIR.args[:1]}, "args and scalars declare"),
        ({"scalars": (*PAIR.scalars, Scalar("more", "what"))}, "args and scalars declare"),
        ({"accuracy": {}}, "accuracy judges []"),
        ({"accuracy": {**PAIR.accuracy, "x": BitExact()}}, "the outputs are ['out']"),
        ({"attributes": ("fast",)}, "unknown attributes ['fast']"),
        ({"mutates": ("w",), "accuracy": {**PAIR.accuracy, "w": BitExact()}}, "which are not all arguments"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(changes: dict[str, Any], words: str) -> None:
    problem = raised(changed, PAIR, **changes)
    assert problem.code == "CONTRACT"
    assert "toy_pair" in problem.what
    assert words in problem.what


def test_every_contradiction_is_told_at_once() -> None:
    problem = raised(changed, PAIR, accuracy={}, attributes=("fast",))
    assert "accuracy judges" in problem.what
    assert "unknown attributes" in problem.what


def test_the_signature_is_the_references() -> None:
    assert PAIR.signature == inspect.signature(PAIR.reference, eval_str=True)
    assert list(PIPE.signature.parameters) == ["x", "k"], "a composite's namespace of ops is no argument"
    assert PIPE.doc == "The toy pair, twice."


def test_arguments_by_name() -> None:
    assert list(CROWD.tensors) == ["a", "b", "c", "d", "e"]
    assert CROWD.required == {"a", "b", "c", "d"}
    assert list(CROWD.options) == ["k", "scale", "mode", "flag"]
    assert WRITE.tensors["cache"].layout == "contiguous"


def test_bind_fills_in_defaults() -> None:
    assert PAIR.bind(1, k=5) == {"x": 1, "y": None, "k": 5, "mode": "plain", "flag": False}


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"kk": 3}), ((1,), {"x": 2})])
def test_a_malformed_call_is_told_how_it_should_look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    problem = raised(PAIR.bind, *args, **kwargs)
    assert problem.code == "TYPE"
    assert problem.what.startswith("toy_pair: ")
    assert "k: int = 1" in problem.fix


@pytest.mark.parametrize("wrong", [{"level": "quick"}, {"fill": "random"}])
def test_a_sample_has_a_level_and_a_fill_that_exist(wrong: dict[str, str]) -> None:
    assert raised(lambda: Sample("s", {}, **wrong)).code == "CONTRACT"  # type: ignore[arg-type]


def test_what_is_declared_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAIR.name = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Arg("x", "T", "F", "").name = "y"  # type: ignore[misc]
