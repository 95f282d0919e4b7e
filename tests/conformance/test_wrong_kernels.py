"""The suite fails every kernel that has one thing wrong, by the check that is there for it."""

from __future__ import annotations

import pytest

from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.mutants.stand_in import first_failure
from glm5_hal.conformance.mutants.wrong import ALL, Wrong

FOUND = [w for w in ALL if not w.needs or w.needs in CHECKS]


@pytest.mark.parametrize("wrong", FOUND, ids=lambda wrong: wrong.id)
def test_a_wrong_kernel_fails(wrong: Wrong) -> None:
    failure = first_failure(wrong.op, wrong.make(), provides=wrong.provides, dtypes=wrong.dtypes, seeds=wrong.seeds)
    assert failure is not None, "survived"
    assert failure.verdict == "FAIL"
    assert failure.code in ((wrong.by,) if isinstance(wrong.by, str) else wrong.by), failure.detail
