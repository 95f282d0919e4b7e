"""Random shapes, lengths and options of an op, drawn and shrunk by Hypothesis; what failed once is tried first.

An op's ``fuzz`` says what may be drawn; an op without one gets its own samples, with other numbers in them. Every
example is a case like any other: its own inputs, the float64 oracle, all checks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.runner import Target
from glm5_hal.errors import HalError
from glm5_hal.ops import specs
from glm5_hal.spec import OpSpec, Sample

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject


@dataclass(frozen=True)
class Picked:
    """Hypothesis as `glm5_hal.spec.Pick`."""

    data: DataObject

    def integer(self, low: int, high: int) -> int:
        from hypothesis import strategies

        return self.data.draw(strategies.integers(low, high))

    def of(self, options: Sequence[Any]) -> Any:
        from hypothesis import strategies

        return self.data.draw(strategies.sampled_from(list(options)))

    def lens(self, requests: int, new: int, keys: int) -> tuple[tuple[int, int], ...]:
        count = self.integer(1, requests)
        return tuple((self.integer(0, new), self.integer(0, keys)) for _ in range(count))


def run(target: Target, op: str, examples: int, seed: int, corpus: Path) -> Iterator[Result]:
    """The corpus of an op, then up to ``examples`` new cases. The first failure of these is shrunk and kept, and is the
    last result."""
    spec = specs()[op]
    for kept in of_corpus(corpus, op):
        yield from runner.run([kept], [target], seed)
    if examples:
        yield from _explored(target, spec, examples, seed, corpus)


def _explored(target: Target, spec: OpSpec, examples: int, seed: int, corpus: Path) -> Iterator[Result]:
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
        result = next(runner.run([case], [target], seed))
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
        results.append(replace(result, repro=_repro(target, spec.name, keep(corpus, case), seed)))
    except hypothesis.errors.Flaky:
        results.append(replace(failed[-1][1], detail=f"now and then: {failed[-1][1].detail}"))
    yield from results


def drawn(spec: OpSpec, pick: Picked) -> Case:
    """One point of an op's space."""
    sample = spec.fuzz(pick) if spec.fuzz is not None else pick.of([s for s in spec.samples() if s.level == "smoke"])
    dtype = pick.of(sample.dtypes)
    return _case(spec.name, dtype, sample)


def _case(op: str, dtype: str, sample: Sample) -> Case:
    text = json.dumps([op, dtype, sample.axes, sample.fill], sort_keys=True, default=list)
    name = f"fuzz-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return Case(op, dtype, replace(sample, id=name, level="smoke", dtypes=(dtype,)))


# --- the corpus: one JSON file per case ------------------------------------------------------------------------------


def keep(corpus: Path, case: Case) -> Path:
    """Write a case to the corpus."""
    sample = case.sample
    path = corpus / case.op / f"{case.dtype}-{sample.id}.json"
    kept = {"op": case.op, "dtype": case.dtype, "axes": sample.axes, "fill": sample.fill, "tags": sorted(sample.tags)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=2, default=list) + "\n", encoding="utf-8")
    return path


def of_corpus(corpus: Path, op: str) -> Iterator[Case]:
    """What has failed before. Raises HalError("CONFIG") for a file that is no case of the op."""
    for path in sorted((corpus / op).glob("*.json")):
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            axes = {name: _as_drawn(value) for name, value in kept["axes"].items()}
            sample = Sample("fuzz", axes, fill=kept["fill"], tags=frozenset(kept["tags"]))
            yield _case(kept["op"], kept["dtype"], sample)
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise HalError(
                "CONFIG", f"{path} is no case: {problem!r}", value=str(path), fix="remove it, or restore it"
            ) from None


def _as_drawn(value: Any) -> Any:
    return tuple(_as_drawn(v) for v in value) if isinstance(value, list) else value


def _repro(target: Target, op: str, path: Path, seed: int) -> str:
    return (
        f"glm5-hal conformance fuzz --backend {target.policy} --op {op} --examples 0 --seed {seed} "
        f"--corpus {path.parent.parent}"
    )
