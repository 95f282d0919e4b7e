"""Hygon's flash_mla behind sparse_mla: judged by the whole suite over a stand-in with what its callers rely on."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import adapters
import pytest
from adapters import alone, put

from glm5_hal import explain
from glm5_hal.backends.hygon import libraries

from . import standins

ARCH = "gfx936"
SPARSE = {"H": 64, "L": 512, "R": 64, "K": 72, "scale": 0.0625, "page": 16, "format": "latent_576"}
#: One request after the other: several tokens of one, none, no keys, more tokens than keys.
RAGGED = ((1, 70), (2, 40), (0, 9), (2, 0), (3, 2), (1, 1))
WIDTHS = {"dtype": "bfloat16", "H": 64, "P": 64, "W": 576, "X": 576, "kv_lora_rank": 512, "scale": 0.0625}

judged = partial(adapters.judged, libraries.adapted, ARCH)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return standins.flash_mla(monkeypatch)


def test_attention_of_ragged_batches(library: ModuleType) -> None:
    result = judged("sparse_mla", {**SPARSE, "lens": RAGGED}, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:flash_mla")


@pytest.mark.parametrize(
    "axes",
    [
        {"holes": True, "lens": ((2, 50), (1, 90))},
        {"page": 1, "lens": ((2, 12),)},
        {"H": 128, "K": 300, "lens": ((2, 310),)},
    ],
    ids=["interleaved_invalid", "page_of_one", "many"],
)
def test_attention_at_the_edges(library: ModuleType, axes: dict[str, Any]) -> None:
    result = judged("sparse_mla", {**SPARSE, **axes}, checks=("form", "accuracy", "poison"), tags=frozenset({"edge"}))
    assert (result.verdict, result.detail) == ("PASS", "")


@pytest.mark.parametrize(
    ("changes", "arch", "code"),
    [
        ({"H": 8}, ARCH, "CHOICE"),
        ({"dtype": "float16"}, ARCH, "DTYPE"),
        ({"cache_format": "fp8_656", "X": 656}, ARCH, "CHOICE"),
        ({"cache_format": "fp8_656", "X": 656}, "gfx938", "CHOICE"),
        ({}, "gfx928", "ARCH"),
        ({}, "gfx942", "ARCH"),
    ],
)
def test_what_nobody_gives_it_goes_elsewhere_and_explain_says_why(
    library: ModuleType, changes: dict[str, Any], arch: str, code: str
) -> None:
    with alone(libraries.adapted, ARCH):
        assert explain("sparse_mla", **WIDTHS).ok
    with alone(libraries.adapted, arch):
        (step,) = explain("sparse_mla", **{**WIDTHS, **changes}).resolution.trace
    assert step.as_dict()["code"] == code


def test_a_build_with_the_older_interface_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "flash_mla", flash_mla_interface=put(monkeypatch, "flash_mla.flash_mla_interface"))
    with alone(libraries.adapted, ARCH):
        (step,) = explain("sparse_mla", **WIDTHS).resolution.trace
    assert "has no flash_mla_interface.flash_mla_sparse_fwd" in step.as_dict()["detail"]
    assert "DAS" in step.as_dict()["fix"]
