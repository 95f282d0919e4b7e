"""torch_mlu_ops behind the ops: judged by the whole suite over a stand-in with the maths of its documentation."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import adapters
import pytest
import torch
from adapters import alone, call, passes_or_is_refused, smoke

from glm5_hal import explain
from glm5_hal.backends.cambricon import attention, libraries

from . import standins

ARCH = "mlu_50"
SPARSE = {"H": 8, "L": 512, "R": 64, "K": 72, "scale": 0.0625, "page": 16, "format": "latent_576"}
DENSE = {key: value for key, value in SPARSE.items() if key != "K"}
#: One request after the other: several tokens of one, none, no keys, more tokens than keys.
RAGGED = ((1, 70), (2, 40), (0, 9), (2, 0), (3, 2), (1, 1))
EDGE = frozenset({"edge"})

judged = partial(adapters.judged, libraries.adapted, ARCH)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return standins.torch_mlu_ops(monkeypatch)


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "axes"), [("sparse_mla", SPARSE), ("mla_decode", DENSE)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_of_ragged_batches(library: ModuleType, op: str, axes: dict[str, Any], dtype: str) -> None:
    result = judged(op, {**axes, "lens": RAGGED}, dtype=dtype, tags=EDGE)
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:tmo")


@pytest.mark.parametrize(
    ("op", "axes"),
    [
        ("sparse_mla", {**SPARSE, "holes": True, "lens": ((2, 50), (1, 90))}),
        ("sparse_mla", {**SPARSE, "freely": True, "lens": ((3, 20), (4, 2))}),
        ("sparse_mla", {**SPARSE, "page": 24, "lens": ((2, 61),)}),
        ("sparse_mla", {**SPARSE, "K": 1, "lens": ((2, 20),)}),
        ("sparse_mla", {**SPARSE, "H": 128, "lens": ((2, 61),)}),
        ("sparse_mla", {**SPARSE, "lens": ((0, 9),)}),
        ("mla_decode", {**DENSE, "page": 24, "lens": ((2, 61),)}),
        ("mla_decode", {**DENSE, "q_scale": 8.0, "lens": ((2, 61),)}),
        ("mla_decode", {**DENSE, "lens": ((0, 9),)}),
    ],
    ids=[
        "holes", "any_order_any_key", "odd_page", "one_key", "many_heads", "no_tokens", "dense_odd_page",
        "dense_peaked", "dense_no_tokens",
    ],
)  # fmt: skip
def test_attention_at_the_edges(library: ModuleType, op: str, axes: dict[str, Any]) -> None:
    result = judged(op, axes, checks=("form", "accuracy", "poison"), tags=EDGE)
    assert (result.verdict, result.detail) == ("PASS", "")


@pytest.mark.parametrize(("op", "axes"), [("mla_decode", DENSE), ("sparse_mla", SPARSE)])
def test_what_is_not_finite_stays_so(library: ModuleType, op: str, axes: dict[str, Any]) -> None:
    args = call(op, {**axes, "lens": ((1, 1), (1, 7))})
    args["q"][0, 3] = -torch.inf
    args["q"][1, 5, 0] = torch.nan
    out, lse = getattr(attention, op).fn(**args)
    for row in ((0, 3), (1, 5)):
        assert out[row].isnan().all()
        assert lse[row].isnan()
    assert lse.isnan().sum() == 2


# --- the rest, by every sample of the suite --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "sample", "dtype"),
    smoke(
        "rms_norm", "add_rms_norm", "silu_and_mul", "mla_cache_write", "index_cache_write", "moe_route", "grouped_gemm"
    ),
)
def test_every_sample_passes_or_is_refused(library: ModuleType, op: str, sample: Any, dtype: str) -> None:
    result = judged(op, sample.axes, dtype=dtype, fill=sample.fill, tags=sample.tags)
    assert passes_or_is_refused(result, "emulated:tmo")


# --- what is refused -------------------------------------------------------------------------------------------------

WIDTHS = {"dtype": "bfloat16", "H": 64, "P": 64, "W": 576, "X": 576, "kv_lora_rank": 512}


@pytest.mark.parametrize(
    ("op", "good", "changes", "code"),
    [
        ("sparse_mla", WIDTHS, {"H": 129}, "LIMIT"),
        ("sparse_mla", WIDTHS, {"cache_format": "fp8_656", "X": 656}, "CHOICE"),
        ("mla_decode", WIDTHS, {"dtype": "float32"}, "DTYPE"),
        ("rms_norm", {"dtype": "bfloat16"}, {"dtype": "float64"}, "DTYPE"),
        ("silu_and_mul", {"dtype": "bfloat16"}, {"limit": 7.0}, "CHOICE"),
        ("moe_route", {"n_group": 8, "topk_group": 4}, {"scoring_func": "softmax"}, "CONDITION"),
        ("grouped_gemm", {"dtype": "bfloat16"}, {"dtype": "float32"}, "DTYPE"),
        ("mla_cache_write", {"dtype": "bfloat16"}, {"cache_format": "latent_512_rope_64"}, "CHOICE"),
    ],
)
def test_what_the_library_does_not_take_goes_elsewhere_and_explain_says_why(
    library: ModuleType, op: str, good: dict[str, Any], changes: dict[str, Any], code: str
) -> None:
    with alone(libraries.adapted, ARCH):
        assert explain(op, **good).ok
        (step,) = explain(op, **{**good, **changes}).resolution.trace
    assert step.as_dict()["code"] == code


def test_an_older_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.torch_mlu_ops(monkeypatch, "1.3.2")
    with alone(libraries.adapted, ARCH):
        (step,) = explain("rms_norm", dtype="bfloat16").resolution.trace
    assert step.as_dict()["detail"] == "torch_mlu_ops>=1.6 is needed and 1.3.2 is installed"
