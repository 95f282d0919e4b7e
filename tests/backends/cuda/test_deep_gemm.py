"""DeepGEMM behind grouped_gemm: judged by the whole suite over a stand-in with its signature, layout and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm5_hal import explain
from glm5_hal.backends.cuda import deep_gemm

from . import standins
from .standins import alone, judged

WIDE = {"N": 64, "K": 128}


@pytest.mark.parametrize(
    "axes",
    [
        {"rows": (3, 0, 13, 1, 0)},
        {"rows": (0, 4, 2), "tail": 5},
        {"rows": (0, 0, 0, 0, 0, 2, 0, 0), "tail": 6},
        {"rows": (9,)},
        {"rows": (130, 3, 128, 127)},
    ],
    ids=["ragged", "unused_rows", "mostly_idle", "one_expert", "more_than_a_block"],
)
def test_experts_rows_are_spread_out_and_gathered_again(monkeypatch: pytest.MonkeyPatch, axes: dict[str, Any]) -> None:
    for block in (128, 224):
        standins.deep_gemm(monkeypatch, block)
        result = judged("grouped_gemm", {**WIDE, **axes}, checks=("form", "accuracy"), tags=frozenset({"edge"}))
        assert (result.verdict, result.detail) == ("PASS", "")


def test_the_whole_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.deep_gemm(monkeypatch)
    result = judged("grouped_gemm", {**WIDE, "rows": (3, 0, 13, 1, 0), "tail": 5})
    assert (result.verdict, result.detail, result.kernel) == ("PASS", "", "emulated:deep_gemm")


@pytest.mark.parametrize("axes", [{"rows": (), "tail": 5}, {"rows": (0, 0, 0)}], ids=["no_experts", "no_rows"])
def test_nothing_to_do(monkeypatch: pytest.MonkeyPatch, axes: dict[str, Any]) -> None:
    standins.deep_gemm(monkeypatch)
    result = judged("grouped_gemm", {**WIDE, **axes}, tags=frozenset({"edge", "empty"}))
    assert (result.verdict, result.detail) == ("PASS", "")


def test_sums_are_exact_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.deep_gemm(monkeypatch)
    result = judged("grouped_gemm", {"N": 64, "K": 2048, "rows": (3, 5)}, fill="exact")
    assert (result.verdict, result.detail) == ("PASS", "")


def test_rows_that_are_not_in_use_reach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.deep_gemm(monkeypatch)
    x = torch.full((5, 64), torch.nan, dtype=torch.bfloat16)
    x[:2] = 1.0
    y = deep_gemm.grouped_gemm.fn(x, torch.ones(2, 64, 64).bfloat16(), torch.tensor([0, 1, 2], dtype=torch.int32))
    assert (y[:2] == 64).all()
    assert (y[2:] == 0).all()


@pytest.mark.parametrize(
    ("changes", "arch", "code"),
    [
        ({"K": 96}, "sm_90", "MULTIPLE"),
        ({"N": 24}, "sm_90", "MULTIPLE"),
        ({"dtype": "float16"}, "sm_90", "DTYPE"),
        ({}, "sm_80", "ARCH"),
    ],
)
def test_what_the_library_does_not_take_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], arch: str, code: str
) -> None:
    standins.deep_gemm(monkeypatch)
    with alone():
        assert explain("grouped_gemm", dtype="bfloat16", **WIDE).ok
    with alone(arch):
        (step,) = explain("grouped_gemm", **{"dtype": "bfloat16", **WIDE, **changes}).resolution.trace
    assert step.as_dict()["code"] == code
