"""A case with its inputs and what is expected of them: made once for every kernel that is judged on it."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from glm5_hal.backend import Kernel
from glm5_hal.conformance import drawing, oracle
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import accuracy
from glm5_hal.conformance.inputs import Draw, digest
from glm5_hal.conformance.trial import Expected, Trial
from glm5_hal.errors import HalError
from glm5_hal.signature import Facts
from glm5_hal.spec import Calibrated, Inputs

#: Elements of a row from which on a drawn one is judged.
WIDE = 8


@dataclass(frozen=True)
class Subject:
    """``other`` is another draw of the same shapes, where there is one."""

    case: Case
    inputs: Inputs
    expected: Expected | None
    digest: str
    seed: int
    other: Mapping[str, Any] | None = None


def prepared(case: Case, seed: int) -> Subject | HalError:
    """`subject_of`, or why the suite itself failed."""
    try:
        return subject_of(case, seed)
    except Exception as problem:  # noqa: BLE001 - becomes the verdict ERROR of this case; the run goes on
        where = traceback.extract_tb(problem.__traceback__)[-1]
        return HalError("CONTRACT", f"{type(problem).__name__}: {problem} ({where.name}, line {where.lineno})")


def subject_of(case: Case, seed: int) -> Subject:
    """Draw a case's inputs, and its shapes where they come of the seed, and compute what is expected of them."""
    if case.relation is not None:
        args = case.relation.inputs(Draw(seed, case.id), case.dtype)
        return Subject(case, Inputs(args), None, digest(args), seed)
    if case.file:
        return _of_file(case, seed)
    if case.bad is not None:
        inputs = case.spec.inputs(case.sample, case.dtype, Draw(seed, case.op))
        return Subject(case, inputs, None, digest(inputs.args), seed)
    if not case.drawn:
        return _judged_by_the_oracle(case, seed)
    subjects = (_judged_by_the_oracle(shaped, seed) for shaped in drawing.shapes(case, seed))
    return next(subject for subject in subjects if _tells(subject))


def _judged_by_the_oracle(case: Case, seed: int) -> Subject:
    inputs = case.spec.inputs(case.sample, case.dtype, Draw(seed, case.id))
    other = case.spec.inputs(case.sample, case.dtype, Draw(seed, f"{case.id} other")).args
    alike = all(_alike(inputs.args[k], v) for k, v in other.items())
    return Subject(case, inputs, _expected(case, inputs), digest(inputs.args), seed, other if alike else None)


def _of_file(case: Case, seed: int) -> Subject:
    from glm5_hal.conformance import replay

    inputs = Inputs(replay.load(case.file)[1])
    return Subject(case, inputs, _expected(case, inputs), digest(inputs.args), seed)


def _expected(case: Case, inputs: Inputs) -> Expected:
    return Expected(oracle.truth(case.spec, inputs.args), oracle.emulation(case.spec, inputs.args))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    return bool(a == b)


def _tells(subject: Subject) -> bool:
    """Whether a right answer can be told from a wrong one: shapes may be so small that any kernel is right."""
    assert subject.expected is not None
    truth = subject.expected.truth
    if not any(t.numel() > 4 for t in (*truth.outs.values(), *truth.mutated.values())):
        return False
    rules = subject.case.spec.accuracy
    widths = [t.shape[-1] for name, t in truth.outs.items() if isinstance(rules[name], Calibrated) and t.dim()]
    if widths and max(widths) < WIDE:
        return False  # a row of a few elements may cancel to nothing, and then no budget is right
    nobody = Kernel(subject.case.op, "reference", subject.case.spec.reference)
    trial = Trial(subject.case, subject.inputs, nobody, nobody.fn, "cpu", subject.expected, Facts())
    return not accuracy.proves_nothing(trial)
