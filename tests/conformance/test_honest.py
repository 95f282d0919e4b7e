"""Kernels unlike the references, all of them right: the suite passes every one.

On many draws, and through every check: `glm5-hal conformance selftest`.
"""

from __future__ import annotations

import pytest

from glm5_hal import ops
from glm5_hal.conformance.mutants.honest import kernel
from glm5_hal.conformance.mutants.honest.catalogue import DTYPES, HONEST
from glm5_hal.conformance.mutants.stand_in import failed, judge

PAIRS = [pytest.param(op, name, id=f"{op}-{name}") for op, ways in HONEST.items() for name in ways]


def test_every_op_has_honest_kernels() -> None:
    assert set(HONEST) == set(ops.names())


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_an_honest_kernel_is_accurate(op: str, name: str) -> None:
    body, provides = HONEST[op][name]
    results = judge(op, kernel(op, body), provides=provides, dtypes=DTYPES, seeds=(1,), checks=("form", "accuracy"))
    assert results
    assert [f"{r.case}: {r.verdict} {r.detail}" for r in failed(results)] == []
