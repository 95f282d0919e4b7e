"""FlashMLA behind the ops: judged by the whole suite over a stand-in with its signatures, conventions and refusals."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from adapters import call

from glm5_hal import StepPlan, explain, ops
from glm5_hal.backends.cuda import flash_mla

from . import standins
from .standins import alone, judged

#: What the kernels are compiled for, with few keys.
SPARSE = {"H": 64, "L": 512, "R": 64, "K": 72, "scale": 0.0625, "page": 16, "format": "latent_576"}
DENSE = {"H": 64, "L": 512, "R": 64, "scale": 0.0625, "page": 64, "format": "latent_576"}
#: One request after the other: several tokens of one, none, no keys, more tokens than keys.
WIDTHS = {"dtype": "bfloat16", "H": 64, "P": 64, "W": 576, "X": 576, "kv_lora_rank": 512}
QUICK = ("form", "accuracy", "poison")
RAGGED = ((1, 70), (2, 40), (0, 9), (2, 0), (3, 2), (1, 1))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return standins.flash_mla(monkeypatch)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["latent_576", "fp8_656"])
def test_sparse_attention_of_the_latent_cache_and_of_the_fp8_cache(library: ModuleType, form: str) -> None:
    result = judged("sparse_mla", {**SPARSE, "format": form, "lens": RAGGED})
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:flash_mla")


@pytest.mark.parametrize("form", ["latent_576", "fp8_656"])
@pytest.mark.parametrize(("arch", "heads"), [("sm_90", 128), ("sm_100", 64), ("sm_103", 128)])
def test_sparse_attention_on_other_chips(monkeypatch: pytest.MonkeyPatch, arch: str, heads: int, form: str) -> None:
    standins.flash_mla(monkeypatch, arch)
    axes = {**SPARSE, "H": heads, "format": form, "lens": RAGGED}
    result = judged("sparse_mla", axes, arch, checks=("accuracy", "layout"))
    assert (result.verdict, result.detail) == ("PASS", "")


@pytest.mark.parametrize(
    "axes",
    [
        {"holes": True, "lens": ((2, 50), (1, 90))},
        {"freely": True, "lens": ((3, 20), (4, 2))},
        {"page": 1, "lens": ((1, 30), (2, 12))},
        {"K": 1, "lens": ((2, 20),)},
        {"K": 300, "lens": ((2, 310),)},
        {"q_scale": 8.0, "lens": ((2, 61),)},
        {"lens": ((0, 9),)},
    ],
    ids=["interleaved_invalid", "any_order_any_key", "page_of_one", "one_key", "many_keys", "peaked", "no_tokens"],
)
@pytest.mark.parametrize("form", ["latent_576", "fp8_656"])
def test_sparse_attention_at_the_edges(library: ModuleType, form: str, axes: dict[str, Any]) -> None:
    result = judged("sparse_mla", {**SPARSE, "format": form, **axes}, checks=QUICK, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail) == ("PASS", "")


def test_dense_attention_of_ragged_batches(library: ModuleType) -> None:
    result = judged("mla_decode", {**DENSE, "lens": RAGGED}, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:flash_mla")


@pytest.mark.parametrize(
    "axes",
    [{"lens": ((0, 9),)}, {"lens": ((20, 130),)}, {"H": 8, "lens": RAGGED}, {"H": 128, "lens": RAGGED}],
    ids=["no_tokens", "a_chunk", "few_heads", "many_heads"],
)
def test_dense_attention_at_the_edges(library: ModuleType, axes: dict[str, Any]) -> None:
    result = judged("mla_decode", {**DENSE, **axes}, checks=QUICK, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail) == ("PASS", "")


def test_a_row_without_a_key_has_the_lse_of_nothing_and_not_the_librarys(library: ModuleType) -> None:
    args = call("mla_decode", {**DENSE, "lens": ((2, 0), (1, 5))})
    out, lse = flash_mla.mla_decode.fn(**args)
    assert (lse[:2] == -torch.inf).all()
    assert (out[:2] == 0).all()
    assert lse[2].isfinite().all()


def test_a_query_that_is_no_number_has_no_lse_either(library: ModuleType) -> None:
    """The library's own would be +inf."""
    args = call("mla_decode", {**DENSE, "lens": ((1, 5), (1, 7))})
    args["q"][1, 3, 0] = torch.nan
    out, lse = flash_mla.mla_decode.fn(**args)
    assert out[1, 3].isnan().all()
    assert lse[1, 3].isnan()
    assert lse[0].isfinite().all()
    assert lse[1, [0, 1, 2]].isfinite().all()


@pytest.mark.parametrize(("op", "axes"), [("mla_decode", DENSE), ("sparse_mla", SPARSE)])
def test_a_score_that_is_not_finite_is_not_taken_for_no_key(library: ModuleType, op: str, axes: dict[str, Any]) -> None:
    """Alone, exp(-inf) adds up to nothing; the library then gives 0, as if there were no key."""
    args = call(op, {**axes, "lens": ((1, 1), (1, 7))})
    args["q"][0, 3, 0] = -torch.inf * args["kv_cache"][args["block_table"][0, 0], 0, 0].sign()
    out, lse = getattr(flash_mla, op).fn(**args)
    assert out[0, 3].isnan().all()
    assert lse[0, 3].isnan()
    assert out[1].isfinite().all()


def test_pages_may_be_rows_apart(library: ModuleType) -> None:
    args = call("sparse_mla", {**SPARSE, "lens": ((1, 61), (2, 30))})
    cache = args["kv_cache"]
    apart = cache.new_full((len(cache), 19, cache.shape[2]), torch.nan)[:, :16]
    apart.copy_(cache)
    for one, other in zip(
        flash_mla.sparse_mla.fn(**args), flash_mla.sparse_mla.fn(**{**args, "kv_cache": apart}), strict=True
    ):
        assert torch.equal(one, other)


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "axes"), [("mla_decode", DENSE), ("sparse_mla", {**SPARSE, "format": "fp8_656"})])
def test_layers_of_a_step_share_one_schedule(library: ModuleType, op: str, axes: dict[str, Any]) -> None:
    args, other = (call(op, {**axes, "lens": lens}) for lens in (((1, 61), (2, 30)), ((1, 40), (2, 64))))
    kernel = getattr(flash_mla, op).fn
    with StepPlan.build(args["seq_lens"], args["cu_seqlens_q"]).active():
        kernel(**args), kernel(**args)
        kernel(**other)  # lengths that are not the plan's
    kernel(**args)
    first, second, others, without = (meta for _, meta in library.calls)
    assert first is second
    assert len({id(meta) for meta in (first, others, without)}) == 3


def test_a_schedule_in_a_graph_is_the_graphs_own(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    args = call("mla_decode", {**DENSE, "lens": ((1, 61), (2, 30))})
    monkeypatch.setattr("glm5_hal.backends._libraries.physical.capturing", lambda: True)
    with StepPlan.build(args["seq_lens"], args["cu_seqlens_q"]).active():
        flash_mla.mla_decode.fn(**args), flash_mla.mla_decode.fn(**args)
    first, second = (meta for _, meta in library.calls)
    assert first is not second


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "changes", "code"),
    [
        ("sparse_mla", {"H": 8}, "CHOICE"),
        ("sparse_mla", {"kv_lora_rank": 256, "W": 320, "X": 320}, "CHOICE"),
        ("sparse_mla", {"cache_format": "fp8_656_ascend", "X": 656}, "CHOICE"),
        ("sparse_mla", {"dtype": "float16"}, "DTYPE"),
        ("sparse_mla", {"scale": -1.0}, "CONDITION"),
        ("sparse_mla", {"cache_format": "fp8_656", "X": 656, "T": 1025}, "CONDITION"),
        ("mla_decode", {"P": 16}, "CHOICE"),
        ("mla_decode", {"H": 129}, "LIMIT"),
        ("mla_decode", {"T": 1025}, "LIMIT"),
        ("mla_decode", {"cache_format": "fp8_656", "X": 656}, "CHOICE"),
    ],
)
def test_what_the_library_does_not_take_goes_elsewhere_and_explain_says_why(
    library: ModuleType, op: str, changes: dict[str, Any], code: str
) -> None:
    good = {**WIDTHS, "scale": 0.0625}
    with alone():
        assert explain(op, **good).ok
        (step,) = explain(op, **{**good, **changes}).resolution.trace
    assert step.as_dict()["code"] == code


@pytest.mark.parametrize(("op", "arch"), [("mla_decode", "sm_100"), ("mla_decode", "sm_80"), ("sparse_mla", "sm_89")])
def test_so_does_what_it_was_not_compiled_for(library: ModuleType, op: str, arch: str) -> None:
    with alone(arch):
        (step,) = explain(op, **WIDTHS).resolution.trace
    assert step.as_dict()["code"] == "ARCH"


def test_pages_that_are_not_whole_rows_apart_are_refused(library: ModuleType) -> None:
    args = call("sparse_mla", {**SPARSE, "lens": ((1, 61), (2, 30))})
    cache = args["kv_cache"]
    odd = cache.new_empty(len(cache), cache[0].numel() + 64)[:, : cache[0].numel()].view(cache.shape)
    with alone():
        assert ops.sparse_mla.choose(**args).name == "emulated:flash_mla"
        trace = explain("sparse_mla", **{**args, "kv_cache": odd}).resolution.trace
    assert "whole number of rows" in str(trace[0])
