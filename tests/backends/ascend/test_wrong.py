"""Every wrong adapter is found out, by what the emulated ops refuse or by the suite: else neither would prove a thing
of the right ones."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch

from glm5_hal.conformance.results import Result

from .emulation import judged
from .wrong import WRONG, Wrong

CHECKS = ("form", "accuracy", "poison")


@cache
def schema(name: str) -> tuple[str, ...]:
    """The names of an op's arguments, in order."""
    return tuple(argument.name for argument in getattr(torch.ops.npu, name).default._schema.arguments)


def verdict(wrong: Wrong) -> Result:
    how = {"dtype": wrong.dtype, "fill": wrong.fill, "tags": frozenset({"edge"})}
    return judged(wrong.op, wrong.axes, checks=CHECKS, once=True, **how)


@cache
def _right(op: str, axes: str, dtype: str, fill: str) -> str:
    """What is said of the adapter without a mistake, at the same point."""
    wrong = next(w for w in WRONG if (w.op, repr(w.axes), w.dtype, w.fill) == (op, axes, dtype, fill))
    result = verdict(wrong)
    return result.verdict if result.verdict == "PASS" else f"{result.verdict}: {result.detail}"


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_adapter_fails_where_the_right_one_passes(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _right(wrong.op, repr(wrong.axes), wrong.dtype, wrong.fill) == "PASS"
    seen: list[str] = []
    if wrong.calls:
        real = getattr(torch.ops.npu, wrong.calls)

        def mistaken(*args: Any, **kwargs: Any) -> Any:
            seen.append(wrong.calls)
            given = {**dict(zip(schema(wrong.calls), args, strict=False)), **kwargs}
            return wrong.results(real(**{**given, **wrong.change(given)}))

        schema(wrong.calls)
        monkeypatch.setattr(torch.ops.npu, wrong.calls, mistaken)
    for where, part in wrong.parts.items():
        module, name = where.split(".")
        monkeypatch.setattr(import_module(f"glm5_hal.backends.ascend.{module}"), name, part)
    result = verdict(wrong)
    assert result.verdict == "FAIL", f"survived: {result.detail}"
    assert seen or not wrong.calls


def test_no_two_have_one_name() -> None:
    names = [str(wrong) for wrong in WRONG]
    assert sorted(set(names)) == sorted(names)
