"""mcoplib behind the ops: judged by the whole suite over ops with its schemas and what its host code refuses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import adapters
import pytest
import torch
from adapters import alone, passes_or_is_refused, put, smoke
from vllm_standins import registered

from glm5_hal import explain
from glm5_hal.backends.metax import libraries, routing

ARCH = "c500"

judged = partial(adapters.judged, libraries.adapted, ARCH)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    put(monkeypatch, "mcoplib", __version__="0.4.0")
    put(monkeypatch, "mcoplib._C")
    put(monkeypatch, "mcoplib._moe_C")
    yield from registered()


@pytest.mark.parametrize(
    ("op", "sample", "dtype"), smoke("rms_norm", "add_rms_norm", "silu_and_mul", "mla_cache_write", "moe_route")
)
def test_every_sample_passes_or_is_refused(library: None, op: str, sample: Any, dtype: str) -> None:
    result = judged(op, sample.axes, dtype=dtype, fill=sample.fill, tags=sample.tags)
    assert passes_or_is_refused(result, "emulated:mcoplib")


@pytest.mark.parametrize(
    ("op", "changes", "code"),
    [
        ("rms_norm", {"dtype": "float64"}, "DTYPE"),
        ("silu_and_mul", {"limit": 7.0}, "CHOICE"),
        ("mla_cache_write", {"cache_format": "fp8_656"}, "CHOICE"),
        ("moe_route", {"dtype": "float32", "top_k": 48}, "LIMIT"),
    ],
)
def test_what_the_library_does_not_take_goes_elsewhere_and_explain_says_why(
    library: None, op: str, changes: dict[str, Any], code: str
) -> None:
    with alone(libraries.adapted, ARCH):
        assert explain(op, dtype="float32" if op == "moe_route" else "bfloat16").ok
        (step,) = explain(op, **{"dtype": "bfloat16", **changes}).resolution.trace
    assert step.as_dict()["code"] == code


def test_a_token_with_a_nan_goes_to_as_many_experts_as_any(library: None) -> None:
    """Of few that are eligible, one is lost to the library's search, which would name expert 0 for it."""
    logits = torch.randn(3, 12)
    logits[0, 2] = logits[1] = torch.nan
    _, ids = routing.moe_route.fn(logits, None, top_k=12, n_group=3, topk_group=3)
    assert all(len(set(row)) == 12 for row in ids.tolist())


def test_a_build_without_its_ops_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "mcoplib", __version__="0.4.0")
    put(monkeypatch, "mcoplib._C")
    with alone(libraries.adapted, ARCH):
        (step,) = explain("rms_norm", dtype="bfloat16").resolution.trace
    assert step.as_dict()["detail"] == "mcoplib._C registers no _C.rms_norm: it is older than its adapter"


def test_an_older_version_is_not_used(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "mcoplib", __version__="0.3.1")
    with alone(libraries.adapted, ARCH):
        (step,) = explain("rms_norm", dtype="bfloat16").resolution.trace
    assert step.as_dict()["detail"] == "mcoplib>=0.4.0 is needed and 0.3.1 is installed"
