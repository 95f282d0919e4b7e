"""MATE behind the ops: judged by the whole suite over a stand-in with its signatures, conventions and refusals."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import adapters
import pytest
import torch
from adapters import alone, call

from glm5_hal import StepPlan, explain
from glm5_hal.backends.musa import flash_mla, libraries

from . import standins

ARCH = "mp_31"
SPARSE = {"H": 64, "L": 512, "R": 64, "K": 72, "scale": 0.0625, "page": 16, "format": "latent_576"}
#: One request after the other: several tokens of one, none, no keys, more tokens than keys.
RAGGED = ((1, 70), (2, 40), (0, 9), (2, 0), (3, 2), (1, 1))
WIDTHS = {"dtype": "bfloat16", "H": 64, "P": 64, "W": 576, "X": 576, "kv_lora_rank": 512, "scale": 0.0625}
QUICK = ("form", "accuracy", "poison")

judged = partial(adapters.judged, libraries.adapted, ARCH)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return standins.mate(monkeypatch)


# --- sparse attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["latent_576", "fp8_656"])
def test_attention_over_the_latent_cache_and_the_fp8_cache(library: ModuleType, form: str) -> None:
    result = judged("sparse_mla", {**SPARSE, "format": form, "lens": RAGGED}, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:mate")


@pytest.mark.parametrize(
    "axes",
    [
        {"holes": True, "lens": ((2, 50), (1, 90))},
        {"freely": True, "lens": ((3, 20), (4, 2))},
        {"page": 1, "lens": ((1, 30), (2, 12))},
        {"K": 1, "lens": ((2, 20),)},
        {"K": 300, "lens": ((2, 310),)},
        {"q_scale": 8.0, "lens": ((2, 61),)},
        {"H": 128, "lens": ((2, 61),)},
        {"lens": ((0, 9),)},
    ],
    ids=[
        "interleaved_invalid", "any_order_any_key", "page_of_one", "one_key", "many_keys", "peaked", "many_heads",
        "no_tokens",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["latent_576", "fp8_656"])
def test_attention_at_the_edges(library: ModuleType, form: str, axes: dict[str, Any]) -> None:
    result = judged("sparse_mla", {**SPARSE, "format": form, **axes}, checks=QUICK, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail) == ("PASS", "")


@pytest.mark.parametrize("form", ["latent_576", "fp8_656"])
def test_a_score_that_is_not_finite_is_not_taken_for_no_key(library: ModuleType, form: str) -> None:
    """Of several parts the library gives 0, as if there were no key."""
    args = call("sparse_mla", {**SPARSE, "format": form, "lens": ((2, 7),)})
    args["q"][0, 3] = -torch.inf
    args["q"][1, 5, 0] = torch.nan
    out, lse = flash_mla.sparse_mla.fn(**args)
    for row in ((0, 3), (1, 5)):
        assert out[row].isnan().all()
        assert lse[row].isnan()
    assert lse.isnan().sum() == 2


def test_layers_of_a_step_share_one_schedule(library: ModuleType) -> None:
    args, other = (
        call("sparse_mla", {**SPARSE, "format": "fp8_656", "lens": lens}) for lens in (((1, 61), (2, 30)), ((1, 40),))
    )
    with StepPlan.build(args["seq_lens"], args["cu_seqlens_q"]).active():
        flash_mla.sparse_mla.fn(**args), flash_mla.sparse_mla.fn(**args)
        assert len(library.flashmla.schedules) == 1
        flash_mla.sparse_mla.fn(**other)
    assert len(library.flashmla.schedules) == 2


def test_pages_may_be_rows_apart_in_a_latent_cache_alone(library: ModuleType) -> None:
    for form, taken in (("latent_576", True), ("fp8_656", False)):
        args = call("sparse_mla", {**SPARSE, "format": form, "lens": ((1, 61), (2, 30))})
        cache = args["kv_cache"]
        apart = cache.new_zeros((len(cache), 19, cache.shape[2]))[:, :16]
        apart.copy_(cache)
        with alone(libraries.adapted, ARCH):
            assert explain("sparse_mla", **{**args, "kv_cache": apart}).ok == taken


# --- the grouped product ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes",
    [
        {"rows": (3, 0, 13, 1, 0), "tail": 5},
        {"rows": (0, 0, 0, 0, 0, 2, 0, 0), "tail": 6},
        {"rows": (9,)},
        {"rows": (130, 3, 128)},
        {"rows": (), "tail": 5},
        {"rows": (0, 0, 0)},
    ],
    ids=["ragged", "mostly_idle", "one_expert", "more_than_a_block", "no_experts", "no_rows"],
)
def test_experts_rows_are_spread_out_and_gathered_again(library: ModuleType, axes: dict[str, Any]) -> None:
    wide = {"N": 1024, "K": 1024, **axes}
    result = judged(
        "grouped_gemm", wide, checks=QUICK, tags=frozenset({"edge", "empty"} if not any(axes["rows"]) else {"edge"})
    )
    assert (result.verdict, result.detail) == ("PASS", "")


def test_the_grouped_product_by_the_whole_suite(library: ModuleType) -> None:
    result = judged("grouped_gemm", {"N": 1024, "K": 1024, "rows": (3, 0, 5), "tail": 2})
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:mate")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "changes", "code"),
    [
        ("sparse_mla", {"H": 8}, "CHOICE"),
        ("sparse_mla", {"dtype": "float16"}, "DTYPE"),
        ("sparse_mla", {"cache_format": "fp8_656_ascend", "X": 656}, "CHOICE"),
        ("sparse_mla", {"cache_format": "fp8_656", "X": 656, "T": 1025}, "CONDITION"),
        ("sparse_mla", {"scale": -1.0}, "CONDITION"),
        ("sparse_mla", {"N": 2**21 // 64}, "CONDITION"),
        ("grouped_gemm", {"K": 1000}, "MULTIPLE"),
        ("grouped_gemm", {"N": 64}, "MULTIPLE"),
        ("grouped_gemm", {"dtype": "float16"}, "DTYPE"),
    ],
)
def test_what_the_library_does_not_take_goes_elsewhere_and_explain_says_why(
    library: ModuleType, op: str, changes: dict[str, Any], code: str
) -> None:
    good = WIDTHS if op == "sparse_mla" else {"dtype": "bfloat16", "N": 4096, "K": 6144}
    with alone(libraries.adapted, ARCH):
        assert explain(op, **good).ok
        (step,) = explain(op, **{**good, **changes}).resolution.trace
    assert step.as_dict()["code"] == code


@pytest.mark.parametrize("op", ["sparse_mla", "grouped_gemm"])
def test_so_does_what_it_was_not_compiled_for(library: ModuleType, op: str) -> None:
    with alone(libraries.adapted, "mp_22"):
        (step,) = explain(op, **(WIDTHS if op == "sparse_mla" else {"dtype": "bfloat16"})).resolution.trace
    assert step.as_dict()["code"] == "ARCH"


@pytest.mark.parametrize("op", ["sparse_mla", "grouped_gemm"])
def test_an_older_version_is_not_used(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    standins.mate(monkeypatch, "0.1.0")
    with alone(libraries.adapted, ARCH):
        (step,) = explain(op, **(WIDTHS if op == "sparse_mla" else {"dtype": "bfloat16"})).resolution.trace
    assert step.as_dict()["detail"] == "mate>=0.2.2 is needed and 0.1.0 is installed"
    assert "github.com/MooreThreads/mate" in step.as_dict()["fix"]


def test_dense_decode_is_left_to_others(library: ModuleType) -> None:
    assert {kernel.op for kernel in libraries.adapted()} == {"sparse_mla", "grouped_gemm"}
