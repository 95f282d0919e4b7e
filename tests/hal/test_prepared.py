"""Prepared weights: a backend's own form, held to the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from toys import installed, raised, stand_in

from glm5_hal import Prepared, prepare
from glm5_hal.errors import HalError

GEMM = {"w_gate_up": torch.randn(2, 6, 4), "w_down": torch.randn(2, 4, 3)}


def prepared(make: Any, op: str = "moe_experts", weights: Mapping[str, torch.Tensor] = GEMM) -> Any:
    with installed(stand_in("acme", prepare=make)):
        return prepare(op, weights, backend="acme")


def test_without_a_form_of_its_own_a_backend_gets_plain_contiguous_weights() -> None:
    for make in (None, lambda op, weights: None):
        made = prepared(make, weights={"w_down": GEMM["w_down"].mT})
        assert (made.op, made.format) == ("moe_experts", "plain")
        assert made["w_down"].is_contiguous()
        assert torch.equal(made["w_down"], GEMM["w_down"].mT)


def test_a_backends_own_form_keeps_names_shapes_and_dtypes() -> None:
    made = prepared(lambda op, w: Prepared(op, {n: t.mT.contiguous().mT for n, t in w.items()}, "acme_nz"))
    assert made.format == "acme_nz"
    assert not made["w_down"].is_contiguous()
    assert torch.equal(made["w_down"], GEMM["w_down"])


def replaced(**changes: Any) -> Any:
    return lambda op, w: Prepared(op, {**w, **changes}, "acme_nz")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (replaced(w_down=torch.randn(2, 3, 4)), "changed or dropped w_down"),
        (replaced(w_down=GEMM["w_down"].half()), "changed or dropped w_down"),
        (lambda op, w: Prepared(op, {"w_down": w["w_down"]}), "changed or dropped w_gate_up"),
        (lambda op, w: dict(w), "returned {"),
        (lambda op, w: Prepared(op, None), "returned Prepared(op='moe_experts', tensors=None"),
        (lambda op, w: Prepared(op, dict.fromkeys(w, 5)), "changed or dropped w_gate_up"),
        (lambda op, w: Prepared("rms_norm", w), "returned Prepared(op='rms_norm'"),
    ],
)
def test_a_backend_that_breaks_the_contract_of_preparing(make: Any, words: str) -> None:
    problem = raised(prepared, make)
    assert problem.code == "CONTRACT"
    assert words in problem.what
    assert "acme" in problem.what


@pytest.mark.parametrize("problem", [RuntimeError("no memory"), SystemExit(0)])
def test_a_backend_that_raises_while_it_prepares_is_named(problem: BaseException) -> None:
    def make(op: str, weights: Any) -> Any:
        raise problem

    told = raised(prepared, make)
    assert told.code == "PLUGIN"
    assert told.what.startswith(f"backend acme: preparing moe_experts raised {type(problem).__name__}: {problem}")
    assert told.fix


def test_an_error_of_ours_comes_out_of_preparing_as_it_is() -> None:
    def make(op: str, weights: Any) -> Any:
        raise HalError("SHAPE", "the width is odd", fix="pad it")

    assert raised(prepared, make).code == "SHAPE"


def test_a_form_is_of_use_only_to_an_op_that_can_be_told_of_it() -> None:
    weights = {"weight": torch.ones(4)}
    assert prepared(lambda op, w: Prepared(op, w), "rms_norm", weights).format == "plain"
    problem = raised(prepared, lambda op, w: Prepared(op, w, "acme_nz"), "rms_norm", weights)
    assert problem.code == "CONTRACT"
    assert "'acme_nz', which rms_norm cannot be told" in problem.what


def test_preparing_for_names_that_do_not_exist() -> None:
    with installed(stand_in("acme")):
        assert "did you mean 'rms_norm'?" in raised(prepare, "rms_nrom", {}, backend="acme").fix
        problem = raised(prepare, "rms_norm", {"wieght": torch.ones(1)}, backend="acme")
        assert (problem.code, problem.value) == ("UNKNOWN", "wieght")
        assert raised(prepare, "rms_norm", {}, backend="emca").code == "UNKNOWN"
