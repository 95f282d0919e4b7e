"""The cases: every point of every op's declaration, each named so that its name alone reproduces it."""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glm5_hal.conformance import relations
from glm5_hal.conformance.bad_inputs import bad_inputs
from glm5_hal.errors import HalError, suggest
from glm5_hal.ops import specs
from glm5_hal.spec import LEVELS, BadInput, OpSpec, Sample

#: The sample whose axes a seed gives.
DRAWN = "drawn"


@dataclass(frozen=True)
class Case:
    """One op at one sample in one dtype; with ``bad``, one bad input that must be refused; and where ``op`` is
    "metamorphic", the relation between ops that the sample names. Inputs are drawn, or come from ``file``. A ``point``
    is a fuzzer's: no catalogue has it."""

    op: str
    dtype: str
    sample: Sample
    bad: BadInput | None = None
    file: str = ""
    point: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}[error-{self.bad.id}]" if self.bad else f"{self.op}[{self.dtype}-{self.sample.id}]"

    @property
    def argument(self) -> str:
        """What makes ``conformance run`` take this case."""
        return f"--replay {shlex.quote(self.file)}" if self.file else f"--case '{self.id}'"

    @property
    def relation(self) -> relations.Relation | None:
        return relations.relation(self.sample.id) if self.op == relations.GROUP else None

    @property
    def drawn(self) -> bool:
        """Whether its shapes come of the seed: see `glm5_hal.conformance.drawing`."""
        return DRAWN in self.sample.tags

    @property
    def spec(self) -> OpSpec:
        return specs()[self.op]

    @property
    def first(self) -> bool:
        """Whether it is the op's first sample, in its first dtype: what is dear is looked at there alone."""
        return self._place == (0, 0)

    @property
    def elected(self) -> bool:
        """Whether it is its sample's one dtype, of one after the other, for what does not depend on the dtype."""
        sample, dtype = self._place
        return self.sample.level == "smoke" and dtype == sample % len(self.sample.dtypes)

    @property
    def _place(self) -> tuple[int, int]:
        ids = [s.id for s in self.spec.samples()]
        dtypes = self.sample.dtypes
        sample = ids.index(self.sample.id) if self.sample.id in ids else len(ids)
        return sample, dtypes.index(self.dtype) if self.dtype in dtypes else -1


def cases(level: str = "smoke", only: Sequence[str] = ("*",)) -> Iterator[Case]:
    """Every case of a level (levels are cumulative) whose op matches one of the globs ``only``."""
    if level not in LEVELS:
        raise HalError("CONFIG", f"no level {level!r}", value=level, fix=suggest(level, LEVELS))
    named = ops_named(only, relations.GROUP)
    for name, spec in specs().items():
        if name in named:
            yield from _of_op(spec, level)
    if relations.GROUP in named:
        for relation in relations.RELATIONS:
            for dtype in (sample := Sample(relation.name, {})).dtypes:
                yield Case(relations.GROUP, dtype, sample)


def ops_named(only: Sequence[str], *more: str) -> list[str]:
    """The ops, and the other names, that match one of these globs. Raises HalError("UNKNOWN") for one without match."""
    known = [*specs(), *more]
    for pattern in only:
        if not fnmatch.filter(known, pattern):
            raise HalError("UNKNOWN", f"no op matches {pattern!r}", value=pattern, fix=suggest(pattern, known))
    return [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in only)]


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
    if spec.fuzz is not None:
        for dtype in good.dtypes:
            yield Case(spec.name, dtype, Sample(DRAWN, {}, tags=frozenset({DRAWN}), dtypes=good.dtypes))
    if level == "full":
        if "float64" in next(iter(spec.dtypes.values()), ()):  # a kernel that takes it must not compute in less
            yield Case(spec.name, "float64", replace(good, level="full"))
        compiled = replace(good, id="compiled", level="full", tags=good.tags | {"compile"}, dtypes=good.dtypes[:1])
        yield Case(spec.name, good.dtypes[0], compiled)
    for bad in bad_inputs(spec):
        yield Case(spec.name, good.dtypes[0], good, bad)
