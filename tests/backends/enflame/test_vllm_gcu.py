"""vllm-gcu behind the ops: judged by the whole suite over ops with its schemas and what its host code refuses."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import adapters
import pytest
from adapters import alone, passes_or_is_refused, put, smoke
from vllm_standins import registered

from glm5_hal import explain
from glm5_hal.backends.enflame import libraries

ARCH = "gcu_130"

judged = partial(adapters.judged, libraries.adapted, ARCH)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    put(monkeypatch, "vllm_gcu")
    yield from registered()


@pytest.mark.parametrize(
    ("op", "sample", "dtype"), smoke("rms_norm", "add_rms_norm", "silu_and_mul", "mla_cache_write")
)
def test_every_sample_passes_or_is_refused(library: None, op: str, sample: Any, dtype: str) -> None:
    result = judged(op, sample.axes, dtype=dtype, fill=sample.fill, tags=sample.tags)
    assert passes_or_is_refused(result, "emulated:vllm_gcu")


@pytest.mark.parametrize(
    ("op", "changes", "code"),
    [
        ("rms_norm", {"dtype": "float64"}, "DTYPE"),
        ("silu_and_mul", {"limit": 7.0}, "CHOICE"),
        ("mla_cache_write", {"cache_format": "fp8_656"}, "CHOICE"),
    ],
)
def test_what_the_library_does_not_take_goes_elsewhere_and_explain_says_why(
    library: None, op: str, changes: dict[str, Any], code: str
) -> None:
    with alone(libraries.adapted, ARCH):
        assert explain(op, dtype="bfloat16").ok
        (step,) = explain(op, **{"dtype": "bfloat16", **changes}).resolution.trace
    assert step.as_dict()["code"] == code


def test_it_is_not_imported_for_it_changes_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "vllm_gcu.py").write_text("raise AssertionError('whoever wants it imports it')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with alone(libraries.adapted, ARCH):
        (step,) = explain("rms_norm", dtype="bfloat16").resolution.trace
    assert "is installed and not imported" in step.as_dict()["detail"]
    assert step.as_dict()["fix"] == "import vllm_gcu first, if that is wanted"


def test_where_it_is_not_installed_nothing_is_said() -> None:
    assert not libraries.adapted()
