"""kunlun_ops behind the ops: judged by the whole suite over a stand-in with the arguments of its public callers."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import adapters
import pytest
from adapters import alone, passes_or_is_refused, put, smoke

from glm5_hal import explain
from glm5_hal.backends.kunlunxin import libraries

from . import standins

ARCH = "xpu"

judged = partial(adapters.judged, libraries.adapted, ARCH)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return standins.kunlun_ops(monkeypatch)


@pytest.mark.parametrize(("op", "sample", "dtype"), smoke("rms_norm", "add_rms_norm", "silu_and_mul"))
def test_every_sample_passes_or_is_refused(library: ModuleType, op: str, sample: Any, dtype: str) -> None:
    result = judged(op, sample.axes, dtype=dtype, fill=sample.fill, tags=sample.tags)
    assert passes_or_is_refused(result, "emulated:kunlun_ops")


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "silu_and_mul"])
def test_it_takes_what_a_model_gives(library: ModuleType, op: str) -> None:
    with alone(libraries.adapted, ARCH):
        assert explain(op, dtype="bfloat16").ok


@pytest.mark.parametrize(
    ("op", "changes", "code"),
    [
        ("rms_norm", {"dtype": "float64"}, "DTYPE"),
        ("silu_and_mul", {"dtype": "float32"}, "DTYPE"),
        ("silu_and_mul", {"limit": 7.0}, "CHOICE"),
    ],
)
def test_what_the_library_does_not_take_goes_elsewhere_and_explain_says_why(
    library: ModuleType, op: str, changes: dict[str, Any], code: str
) -> None:
    with alone(libraries.adapted, ARCH):
        (step,) = explain(op, **{"dtype": "bfloat16", **changes}).resolution.trace
    assert step.as_dict()["code"] == code


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"version": "0.1.40"}, "kunlun_ops>=0.1.58 is needed and 0.1.40 is installed"),
        ({"without": "swiglu"}, "kunlun_ops has no swiglu: it is older than its adapter"),
    ],
)
def test_an_older_one_is_not_used(monkeypatch: pytest.MonkeyPatch, broken: dict[str, str], why: str) -> None:
    if "without" in broken:
        put(monkeypatch, "kunlun_ops", rmsnorm=standins.rmsnorm, add_rmsnorm=standins.add_rmsnorm)
    else:
        standins.kunlun_ops(monkeypatch, **broken)
    with alone(libraries.adapted, ARCH):
        (step,) = explain("rms_norm", dtype="bfloat16").resolution.trace
    assert step.as_dict()["detail"] == why
