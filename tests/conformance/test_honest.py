"""Kernels unlike the references, all of them right: the suite passes every one, on every draw."""

from __future__ import annotations

from typing import Any

import pytest

from glm5_hal.conformance.mutants.honest import kernel
from glm5_hal.conformance.mutants.honest.catalogue import DTYPES, HONEST
from glm5_hal.conformance.mutants.stand_in import failed, judge

EVERYDAY, MORE = range(2), range(2, 20)
PAIRS = [pytest.param(op, name, id=f"{op}-{name}") for op, ways in HONEST.items() for name in ways]


def false_alarms(op: str, name: str, **how: Any) -> list[str]:
    body, provides = HONEST[op][name]
    results = judge(op, kernel(op, body), provides=provides, dtypes=DTYPES, **how)
    assert results
    return [f"{r.case} seed {r.seed}: {r.verdict} {r.detail}" for r in failed(results)]


def test_every_op_has_honest_kernels() -> None:
    from glm5_hal.ops import names

    assert set(HONEST) == set(names())


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_an_honest_kernel_is_accurate(op: str, name: str) -> None:
    assert false_alarms(op, name, seeds=EVERYDAY, checks=("form", "accuracy")) == []


@pytest.mark.parametrize("op", HONEST)
def test_an_honest_kernel_passes_every_check(op: str) -> None:
    assert false_alarms(op, next(iter(HONEST[op]))) == []


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_an_honest_kernel_is_accurate_on_many_draws(op: str, name: str) -> None:
    assert false_alarms(op, name, seeds=MORE, checks=("form", "accuracy")) == []


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_every_honest_kernel_passes_every_check(op: str, name: str) -> None:
    assert false_alarms(op, name, seeds=(20,)) == []
