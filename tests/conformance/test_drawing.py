"""Cases whose shapes come of the seed, so that no kernel can have been made for them."""

from __future__ import annotations

import pytest

from glm5_hal.conformance import drawing, runner
from glm5_hal.conformance.cases import Case, cases, find
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import kernel
from glm5_hal.conformance.mutants.stand_in import NAME, Made, installed
from glm5_hal.conformance.subject import prepared, subject_of
from glm5_hal.conformance.target import targets
from glm5_hal.errors import HalError
from glm5_hal.ops import names


def shapes(case: Case, seed: int) -> dict[str, tuple[int, ...]]:
    args = subject_of(case, seed).inputs.args
    return {k: tuple(v.shape) for k, v in args.items() if hasattr(v, "shape")}


def test_every_op_has_a_drawn_case_in_each_of_its_dtypes() -> None:
    drawn = [c for c in cases("smoke") if c.drawn]
    assert {c.op for c in drawn} == set(names())
    assert all({d.dtype for d in drawn if d.op == c.op} == set(c.sample.dtypes) for c in drawn)


@pytest.mark.parametrize("op", names())
def test_its_shapes_are_the_seeds_and_it_proves_something(op: str) -> None:
    case = next(c for c in cases("smoke", (op,)) if c.drawn)
    by_seed = [shapes(case, seed) for seed in range(4)]
    assert by_seed[0] == shapes(case, 0)
    assert len({str(s) for s in by_seed}) > 1
    assert not any(isinstance(prepared(case, seed), HalError) for seed in range(4))


def test_a_kernel_that_knows_the_shapes_of_one_seed_fails_on_another() -> None:
    (case,) = find(["rms_norm[float32-drawn]"])
    known, right = shapes(case, 0), honest.rms_norm()

    def made_for_seed_0(a: honest.Args) -> object:
        return right(a) if a.x.shape[-1] == known["x"][-1] else right(a) * 1.01

    with installed(Made("rms_norm", kernel("rms_norm", made_for_seed_0))):
        (target,) = targets(NAME)
        verdicts = [next(runner.run([case], [target], seed)).verdict for seed in (0, 1)]
    assert verdicts == ["PASS", "FAIL"]


def test_a_point_survives_the_way_to_a_worker() -> None:
    (case,) = find(["mla_decode[bfloat16-drawn]"])
    point = drawing.point(case.op, case.dtype, subject_of(case, 3).case.sample)
    assert drawing.of_record(drawing.as_record(point)) == point
