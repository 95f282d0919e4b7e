"""mcFlashMLA behind the ops: judged by the whole suite over a stand-in with its signature, conventions and refusals."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import adapters
import pytest
import torch
from adapters import alone, call

from glm5_hal import StepPlan, explain, ops
from glm5_hal.backends.metax import flash_mla, libraries

from . import standins

ARCH = "c500"
SPARSE = {"H": 64, "L": 512, "R": 64, "K": 72, "scale": 0.0625, "page": 16, "format": "latent_576"}
DENSE = {"H": 64, "L": 512, "R": 64, "scale": 0.0625, "page": 64, "format": "latent_576"}
#: One request after the other: several tokens of one, none, no keys, more tokens than keys.
RAGGED = ((1, 70), (2, 40), (0, 9), (2, 0), (3, 2), (1, 1))
WIDTHS = {"dtype": "bfloat16", "H": 64, "P": 64, "W": 576, "X": 576, "kv_lora_rank": 512, "scale": 0.0625}
QUICK = ("form", "accuracy", "poison")

judged = partial(adapters.judged, libraries.adapted, ARCH)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return standins.flash_mla(monkeypatch)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "axes"), [("sparse_mla", SPARSE), ("mla_decode", DENSE)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_of_ragged_batches(library: ModuleType, op: str, axes: dict[str, Any], dtype: str) -> None:
    result = judged(op, {**axes, "lens": RAGGED}, dtype=dtype, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:flash_mla")


@pytest.mark.parametrize(
    "axes",
    [
        {"holes": True, "lens": ((2, 50), (1, 90))},
        {"freely": True, "lens": ((3, 20), (4, 2))},
        {"page": 1, "lens": ((1, 30), (2, 12))},
        {"page": 24, "lens": ((2, 61),)},
        {"K": 1, "lens": ((2, 20),)},
        {"K": 300, "lens": ((2, 310),)},
        {"q_scale": 8.0, "lens": ((2, 61),)},
        {"lens": ((0, 9),)},
        {"H": 8, "lens": RAGGED},
        {"H": 128, "lens": RAGGED},
    ],
    ids=[
        "interleaved_invalid", "any_order_any_key", "page_of_one", "odd_page", "one_key", "many_keys", "peaked",
        "no_tokens", "few_heads", "many_heads",
    ],
)  # fmt: skip
def test_sparse_attention_at_the_edges(library: ModuleType, axes: dict[str, Any]) -> None:
    result = judged("sparse_mla", {**SPARSE, **axes}, checks=QUICK, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail) == ("PASS", "")


@pytest.mark.parametrize(
    "axes",
    [
        {"lens": ((0, 9),)},
        {"lens": ((20, 130),)},
        {"H": 8, "lens": RAGGED},
        {"page": 1, "lens": RAGGED},
        {"page": 16, "lens": RAGGED},
    ],
    ids=["no_tokens", "a_chunk", "few_heads", "page_of_one", "small_pages"],
)
def test_dense_attention_at_the_edges(library: ModuleType, axes: dict[str, Any]) -> None:
    result = judged("mla_decode", {**DENSE, **axes}, checks=QUICK, tags=frozenset({"edge"}))
    assert (result.verdict, result.detail) == ("PASS", "")


def test_many_tokens_are_attended_in_parts(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_mla, "TOKENS", 4)
    args = call("sparse_mla", {**SPARSE, "lens": ((9, 61), (2, 30))})
    parts = flash_mla.sparse_mla.fn(**args)
    assert len(library.schedules) == 3
    monkeypatch.setattr(flash_mla, "TOKENS", 1024)
    for one, other in zip(parts, flash_mla.sparse_mla.fn(**args), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("op", "axes"), [("mla_decode", DENSE), ("sparse_mla", SPARSE)])
def test_a_token_without_a_key_has_what_nobody_wrote_put_right(
    library: ModuleType, op: str, axes: dict[str, Any]
) -> None:
    args = call(op, {**axes, "lens": ((2, 0), (1, 5))})
    out, lse = getattr(flash_mla, op).fn(**args)
    assert (lse[:2] == -torch.inf).all()
    assert (out[:2] == 0).all()
    assert lse[2].isfinite().all()


@pytest.mark.parametrize(("op", "axes"), [("mla_decode", DENSE), ("sparse_mla", SPARSE)])
def test_a_score_that_is_not_finite_is_not_taken_for_no_key(library: ModuleType, op: str, axes: dict[str, Any]) -> None:
    """Alone, exp(-inf) adds up to nothing; the library then gives 0, as if there were no key."""
    args = call(op, {**axes, "lens": ((1, 1), (1, 7))})
    args["q"][0, 3, 0] = -torch.inf * args["kv_cache"][args["block_table"][0, 0], 0, 0].sign()
    args["q"][1, 5, 0] = torch.nan
    out, lse = getattr(flash_mla, op).fn(**args)
    for row in ((0, 3), (1, 5)):
        assert out[row].isnan().all()
        assert lse[row].isnan()
    assert lse.isnan().sum() == 2


def test_rows_that_nobody_wrote_are_not_read(library: ModuleType) -> None:
    """Row 0 of the cache is one: its sparse kernels would read it for every index that is -1."""
    args = call("sparse_mla", {**SPARSE, "lens": ((2, 30),), "holes": True})
    before = flash_mla.sparse_mla.fn(**args)
    free = next(n for n in range(len(args["kv_cache"])) if n not in args["block_table"][0].tolist())
    order = torch.arange(len(args["kv_cache"]))
    order[0], order[free] = free, 0
    moved = {
        **args,
        "kv_cache": args["kv_cache"][order].clone(),
        "block_table": order[args["block_table"].long()].int(),
    }
    moved["kv_cache"][0] = torch.nan
    for one, other in zip(before, flash_mla.sparse_mla.fn(**moved), strict=True):
        assert torch.equal(one, other)


def test_pages_may_be_rows_apart(library: ModuleType) -> None:
    args = call("sparse_mla", {**SPARSE, "lens": ((1, 61), (2, 30))})
    cache = args["kv_cache"]
    apart = cache.new_full((len(cache), 19, cache.shape[2]), torch.nan)[:, :16]
    apart.copy_(cache)
    for one, other in zip(
        flash_mla.sparse_mla.fn(**args), flash_mla.sparse_mla.fn(**{**args, "kv_cache": apart}), strict=True
    ):
        assert torch.equal(one, other)


def test_layers_of_a_step_share_the_dense_kernels_schedule(library: ModuleType) -> None:
    args, other = (call("mla_decode", {**DENSE, "lens": lens}) for lens in (((1, 61), (2, 30)), ((1, 40), (2, 64))))
    kernel = flash_mla.mla_decode.fn
    with StepPlan.build(args["seq_lens"], args["cu_seqlens_q"]).active():
        kernel(**args), kernel(**args)
        assert len(library.schedules) == 1
        kernel(**other)  # lengths that are not the plan's
    kernel(**args)
    assert len(library.schedules) == 3


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "changes", "code"),
    [
        ("sparse_mla", {"H": 129}, "LIMIT"),
        ("sparse_mla", {"kv_lora_rank": 256, "W": 320, "X": 320}, "CHOICE"),
        ("sparse_mla", {"cache_format": "fp8_656", "X": 656}, "CHOICE"),
        ("sparse_mla", {"dtype": "float32"}, "DTYPE"),
        ("sparse_mla", {"scale": -1.0}, "CONDITION"),
        ("mla_decode", {"P": 48}, "CONDITION"),
        ("mla_decode", {"T": 1025}, "LIMIT"),
        ("mla_decode", {"cache_format": "fp8_656", "X": 656}, "CHOICE"),
    ],
)
def test_what_the_library_does_not_take_goes_elsewhere_and_explain_says_why(
    library: ModuleType, op: str, changes: dict[str, Any], code: str
) -> None:
    with alone(libraries.adapted, ARCH):
        assert explain(op, **WIDTHS).ok
        (step,) = explain(op, **{**WIDTHS, **changes}).resolution.trace
    assert step.as_dict()["code"] == code


def test_pages_that_are_not_whole_rows_apart_are_refused(library: ModuleType) -> None:
    args = call("sparse_mla", {**SPARSE, "lens": ((1, 61), (2, 30))})
    cache = args["kv_cache"]
    odd = cache.new_empty(len(cache), cache[0].numel() + 64)[:, : cache[0].numel()].view(cache.shape)
    with alone(libraries.adapted, ARCH):
        assert ops.sparse_mla.choose(**args).name == "emulated:flash_mla"
        trace = explain("sparse_mla", **{**args, "kv_cache": odd}).resolution.trace
    assert "whole number of rows" in str(trace[0])


@pytest.mark.parametrize(
    ("version", "newer", "reason"),
    [
        ("1.0.0", False, "flash_mla>=1.0.1 is needed and 1.0.0 is installed"),
        ("1.0.1", True, "flash_mla has flash_mla_interface.FlashMLASchedMeta: it is newer than its adapter"),
    ],
)
def test_a_library_of_another_generation_is_not_used(
    monkeypatch: pytest.MonkeyPatch, version: str, newer: bool, reason: str
) -> None:
    library = standins.flash_mla(monkeypatch, version)
    if newer:
        library.flash_mla_interface.FlashMLASchedMeta = object
    with alone(libraries.adapted, ARCH):
        (step,) = explain("sparse_mla", **WIDTHS).resolution.trace
    assert step.as_dict()["detail"] == reason
    assert "github.com/MetaX-MACA/mcFlashMLA" in step.as_dict()["fix"]
