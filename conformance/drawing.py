"""Points of an op's space that no catalogue has: shapes, lengths and options that come of a seed, or of a fuzzer.

A kernel that was made for the suite's own shapes has not seen these.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.inputs import Draw
from glm5_hal.spec import Pick, Sample

#: How often shapes are drawn anew when they prove nothing.
ATTEMPTS = 100


class Picks(ABC):
    """`glm5_hal.spec.Pick`, made of a way to choose an integer."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""

    def of(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def lens(self, requests: int, new: int, keys: int) -> tuple[tuple[int, int], ...]:
        count = self.integer(1, requests)
        return tuple((self.integer(0, new), self.integer(0, keys)) for _ in range(count))


@dataclass(frozen=True)
class Seeded(Picks):
    draw: Draw

    def integer(self, low: int, high: int) -> int:
        return int(self.draw.integers(low, high + 1))


def picked(case: Case, pick: Pick) -> Case:
    """The case with a point of its op's space; its name and its dtype stay."""
    spec, own = case.spec, case.sample
    assert spec.fuzz is not None
    sample = spec.fuzz(pick)
    return replace(case, sample=replace(own, axes=sample.axes, fill=sample.fill, tags=own.tags | sample.tags))


def shapes(case: Case, seed: int) -> Iterator[Case]:
    """The points that a seed gives a drawn case, in the order in which they are tried."""
    for attempt in range(ATTEMPTS):
        yield picked(case, Seeded(Draw(seed, f"{case.id} {attempt}")))


def as_record(case: Case) -> dict[str, Any]:
    """A point as JSON can hold it."""
    sample = case.sample
    return {"op": case.op, "dtype": case.dtype, "axes": sample.axes, "fill": sample.fill, "tags": sorted(sample.tags)}


def of_record(record: Mapping[str, Any]) -> Case:
    """The case of a record: its name follows from what is in it."""
    axes = {name: _as_drawn(value) for name, value in record["axes"].items()}
    sample = Sample("fuzz", axes, fill=record["fill"], tags=frozenset(record["tags"]))
    return point(record["op"], record["dtype"], sample)


def point(op: str, dtype: str, sample: Sample) -> Case:
    text = json.dumps([op, dtype, sample.axes, sample.fill], sort_keys=True, default=list)
    name = f"fuzz-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return Case(op, dtype, replace(sample, id=name, level="smoke", dtypes=(dtype,)), point=True)


def _as_drawn(value: Any) -> Any:
    return tuple(_as_drawn(v) for v in value) if isinstance(value, list) else value
