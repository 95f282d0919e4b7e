"""The cases: every point of every op's declaration, each named so that its name alone reproduces it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glm5_hal.conformance.bad_inputs import bad_inputs
from glm5_hal.errors import HalError, suggest
from glm5_hal.ops import specs
from glm5_hal.spec import LEVELS, BadInput, OpSpec, Sample


@dataclass(frozen=True)
class Case:
    """One op at one sample in one dtype; or, with ``bad``, one bad input that must be refused."""

    op: str
    dtype: str
    sample: Sample
    bad: BadInput | None = None

    @property
    def id(self) -> str:
        return f"{self.op}[error-{self.bad.id}]" if self.bad else f"{self.op}[{self.dtype}-{self.sample.id}]"

    @property
    def spec(self) -> OpSpec:
        return specs()[self.op]


def cases(level: str = "smoke", only: Sequence[str] = ("*",)) -> Iterator[Case]:
    """Every case of a level (levels are cumulative) whose op matches one of the globs ``only``."""
    if level not in LEVELS:
        raise HalError("CONFIG", f"no level {level!r}", value=level, fix=suggest(level, LEVELS))
    for pattern in only:
        if not fnmatch.filter(specs(), pattern):
            raise HalError("UNKNOWN", f"no op matches {pattern!r}", value=pattern, fix=suggest(pattern, specs()))
    for name, spec in specs().items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in only):
            yield from _of_op(spec, level)


def find(case_ids: Sequence[str]) -> list[Case]:
    """The cases of these ids, whatever their level. Raises HalError("UNKNOWN") with the nearest id."""
    known = {case.id: case for case in cases("full")}
    for case_id in case_ids:
        if case_id not in known:
            raise HalError("UNKNOWN", f"no case {case_id!r}", value=case_id, fix=_nearest(case_id, list(known)))
    return [known[case_id] for case_id in case_ids]


def _nearest(case_id: str, known: list[str]) -> str:
    of_op = [k for k in known if k.split("[")[0] == case_id.split("[")[0]]
    return suggest(case_id, of_op or {k.split("[")[0] for k in known})


def _of_op(spec: OpSpec, level: str) -> Iterator[Case]:
    samples = list(spec.samples())
    good = samples[0]
    for sample in samples:
        if LEVELS.index(sample.level) <= LEVELS.index(level):
            for dtype in sample.dtypes:
                yield Case(spec.name, dtype, sample)
    if "float64" in next(iter(spec.dtypes.values()), ()):  # a kernel that takes it must not compute in less
        yield Case(spec.name, "float64", good)
    for bad in bad_inputs(spec):
        yield Case(spec.name, good.dtypes[0], good, bad)
