"""Random shapes, lengths and options of an op, drawn and shrunk by Hypothesis; what failed once is tried first.

An op's ``fuzz`` says what may be drawn; an op without one gets its own samples, with other numbers in them. Every
example is a case like any other: its own inputs, the float64 oracle, all checks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_hal.conformance import drawing
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.drawing import Picks
from glm5_hal.conformance.results import Result
from glm5_hal.errors import HalError
from glm5_hal.ops import specs
from glm5_hal.spec import OpSpec

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject


class Picked(Picks):
    """Hypothesis as `glm5_hal.spec.Pick`."""

    def __init__(self, data: DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        from hypothesis import strategies

        return self._data.draw(strategies.integers(low, high))

    def of(self, options: Sequence[Any]) -> Any:
        from hypothesis import strategies

        return self._data.draw(strategies.sampled_from(list(options)))


#: Judges one case: in this process, or in a worker.
Judge = Callable[[Case], Result]


def run(judge: Judge, op: str, examples: int, seed: int, corpus: Path) -> Iterator[Result]:
    """The corpus of an op, then up to ``examples`` new cases. The first failure of these is shrunk and kept, and is the
    last result."""
    for kept in of_corpus(corpus, op):
        yield judge(kept)
    if examples:
        yield from _explored(judge, specs()[op], examples, seed, corpus)


def _explored(judge: Judge, spec: OpSpec, examples: int, seed: int, corpus: Path) -> Iterator[Result]:
    try:
        import hypothesis
        from hypothesis import strategies
    except ImportError:
        raise HalError("CONFIG", "fuzzing needs Hypothesis", fix="pip install 'glm5-hal[fuzz]'") from None
    results: list[Result] = []
    failed: list[tuple[Case, Result]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(strategies.data())
    def example(data: DataObject) -> None:
        case = drawn(spec, Picked(data))
        result = judge(case)
        if result.ok or result.verdict == "MISTRUSTED":  # shapes so small that any kernel is right
            if result.ok and not failed:
                results.append(result)
        else:
            failed.append((case, result))
            raise AssertionError(result.code or result.verdict)

    try:
        example()
    except AssertionError:  # Hypothesis ends with the smallest example that it found
        case, result = failed[-1]
        results.append(replace(result, repro=_repro(result, keep(corpus, case))))
    except hypothesis.errors.Flaky:
        results.append(replace(failed[-1][1], detail=f"now and then: {failed[-1][1].detail}"))
    yield from results


def drawn(spec: OpSpec, pick: Picked) -> Case:
    """One point of an op's space."""
    sample = spec.fuzz(pick) if spec.fuzz is not None else pick.of([s for s in spec.samples() if s.level == "smoke"])
    return drawing.point(spec.name, pick.of(sample.dtypes), sample)


# --- the corpus: one JSON file per case ------------------------------------------------------------------------------


def keep(corpus: Path, case: Case) -> Path:
    """Write a case to the corpus."""
    path = corpus / case.op / f"{case.dtype}-{case.sample.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(drawing.as_record(case), indent=2, default=list) + "\n", encoding="utf-8")
    return path


def of_corpus(corpus: Path, op: str) -> Iterator[Case]:
    """What has failed before. Raises HalError("CONFIG") for a file that is no case of the op."""
    for path in sorted((corpus / op).glob("*.json")):
        try:
            yield drawing.of_record(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise HalError(
                "CONFIG", f"{path} is no case: {problem!r}", value=str(path), fix="remove it, or restore it"
            ) from None


def _repro(result: Result, path: Path) -> str:
    return (
        f"glm5-hal conformance fuzz --backend {result.backend} --op {result.op} --examples 0 --seed {result.seed} "
        f"--corpus {path.parent.parent}"
    )
