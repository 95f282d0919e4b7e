"""The tuning file names what there is, and claims nothing that was not measured."""

from __future__ import annotations

import pytest

from glm5_hal.backends._triton.tunable import CANDIDATES, EVERY, candidates
from glm5_hal.backends._triton.tuning import CONSERVATIVE, UNTUNED, tuning
from glm5_hal.backends.cuda import TUNING, glm5_backend
from glm5_hal.tuning.sections import parsed


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_architecture_has_sizes(arch: str) -> None:
    found = tuning(arch, TUNING)
    assert found.blocks.keys() == tuning("any").blocks.keys()
    assert found.source


def test_sizes_say_where_they_were_measured() -> None:
    for arch, table in parsed(TUNING.read_text())["arch"].items():
        measured = {name: value for name, value in table.items() if name not in ("source", "limits")}
        assert (table["source"] == UNTUNED) == (not measured), arch


def test_candidates_are_for_sizes_that_there_are() -> None:
    known = parsed(CONSERVATIVE.read_text())["blocks"]
    every = {name for sizes in known.values() for name in sizes}
    for op, values in parsed(CANDIDATES.read_text())["candidates"].items():
        assert set(values) <= (every if op == EVERY else set(known[op])), op


def test_the_size_in_force_is_a_candidate_and_an_unnamed_one_is_halved_and_doubled() -> None:
    assert candidates("no_such_op", {"WIDTH": 48, "num_warps": 1, "ONE": 1}) == {
        "WIDTH": [24, 48, 96],
        "num_warps": [1, 2, 4, 8],
        "ONE": [1, 2],
    }


def test_what_tune_is_told_of_the_backend() -> None:
    tunable = glm5_backend().tuning
    assert tunable is not None
    assert tunable.file == TUNING
    sizes = tunable.sizes("sm_90")
    assert sizes == tuning("sm_90", TUNING).blocks
    pytest.importorskip("triton")
    (kernel,) = (k for k in tunable.kernels("sm_90", {"rope": {"num_warps": 16}}) if k.op == "rope")
    assert kernel.fn.args[0]["rope"] == {**sizes["rope"], "num_warps": 16}  # type: ignore[attr-defined]
    assert kernel.fn.args[0]["hadamard"] == sizes["hadamard"]  # type: ignore[attr-defined]
