"""One result per case: the record of ``results.jsonl``, from which every other report derives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from glm5_hal.conformance import typed

SCHEMA = 1

#: Every verdict, and whether it lets a run succeed.
VERDICTS: dict[str, bool] = {
    "PASS": True,
    "FAIL": False,
    "XFAIL": True,
    "XPASS": False,
    "UNSUPPORTED": True,
    "MISTRUSTED": False,
    "CRASH": False,
    "HANG": False,
    "OOM": False,
    "ERROR": False,
}


@dataclass(frozen=True)
class Result:
    """What one case gave on one kernel.

    Attributes:
        case: the id, which with backend and seed reproduces the result.
        kernel: "backend:provider" that served the call, "" if none did.
        verdict: one of :data:`VERDICTS`; ``code`` and ``detail`` say why it is not PASS.
        evidence: how strongly the result speaks about hardware.
        errors, budget: measured errors and what they may be, by output and criterion.
        checks: every check's answer: "ok", "failed: ...", or "n/a: ...".
        inputs: sha256 of the inputs' bytes.
        claims: the attributes that the kernel claims for this call, and is held to.
        waiver: the waiver that makes this an XFAIL or an XPASS.
        work: the call's floating-point operations and bytes ("flops", "bytes"), as its op declares them.
        seconds: the whole case; kernel_seconds: the judged run alone.
        repro: the command that runs this case again.
        remark: what the case gave in a worker that others had used, where alone it gives something else; or how its
            worker ended afterwards, when nothing was running. Who did that was looked for, and ``culprit`` is the
            kernel that does it again, as "CASE on POLICY"; "" where none is known.
        log: the last lines that its worker process printed, where that process did not survive the case.
    """

    case: str
    op: str
    backend: str
    kernel: str
    verdict: str
    evidence: str
    device: str
    dtype: str
    level: str
    seed: int
    repro: str
    code: str = ""
    detail: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)
    checks: Mapping[str, str] = field(default_factory=dict)
    inputs: str = ""
    seconds: float = 0.0
    kernel_seconds: float = 0.0
    claims: Sequence[str] = ()
    waiver: str = ""
    work: Mapping[str, float] = field(default_factory=dict)
    log: str = ""
    remark: str = ""
    culprit: str = ""
    schema: int = SCHEMA

    @property
    def ok(self) -> bool:
        return VERDICTS[self.verdict]

    @property
    def worst(self) -> tuple[float | None, str]:
        """The largest error as a share of its budget, and by which criterion; None where nothing was measured, or all
        of it was demanded exactly, and is. Infinity where the budget is nothing and the error is not."""
        ratio, criterion = None, ""
        for name, error in self.errors.items():
            allowed = self.budget.get(name, 0.0)
            share = error / allowed if allowed else None if error == 0 else float("inf")
            share = float("inf") if share is not None and share != share else share
            if share is not None and (ratio is None or share > ratio):
                ratio, criterion = share, name
        return ratio, criterion

    def as_json(self) -> str:
        return json.dumps(_finite(asdict(self)), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: as text they stay readable and the line stays valid."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return value


def from_record(record: Any) -> Result:
    """The inverse of `Result.as_json`. Raises ValueError for what is no such record."""
    result = typed.read(Result, record, "a result")
    if result.verdict not in VERDICTS:
        raise ValueError(f"no verdict {result.verdict!r:.80}")
    if result.schema != SCHEMA:
        raise ValueError(f"schema {result.schema}; this suite reads {SCHEMA}")
    return result


def succeeded(results: Sequence[Result]) -> bool:
    """Nothing failed, and something passed: a run in which all is UNSUPPORTED has judged nothing."""
    return all(r.ok for r in results) and any(r.verdict == "PASS" for r in results)


def lacks(results: Sequence[Result]) -> bool:
    """Whether these results, of one op on one target, say no more than that the target has no kernel of it."""
    return all(r.code == "NOT_IMPLEMENTED" for r in results)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Verdict counts, whole and by op, and what failed: what `--json` prints."""
    ops: dict[str, Counter[str]] = {}
    for r in results:
        ops.setdefault(r.op, Counter())[r.verdict] += 1
    return {
        "ok": succeeded(results),
        "cases": len(results),
        "verdicts": dict(Counter(r.verdict for r in results)),
        "ops": {op: dict(c) for op, c in ops.items()},
        "failed": [
            {"case": r.case, "kernel": r.kernel, "verdict": r.verdict, "detail": r.detail, "repro": r.repro}
            for r in results
            if not r.ok
        ],
    }
