"""What must hold between the parts of one result, and between a manifest and its device."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from glm5_hal.conformance import relations
from glm5_hal.conformance.bundle.manifest import Manifest
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.waivers import Book
from glm5_hal.errors import CODES

#: Verdicts for which a kernel was run to the end, so that its checks and numbers are there.
RAN = ("PASS", "MISTRUSTED")

#: The checks that measure: against the oracle, or of two ways to one result.
MEASURE = ("accuracy", relations.GROUP)

#: The checks that always answer, by "ok" or "failed". The others may find nothing to look at.
ALWAYS = ("form", "integrity", "rerun", "workspace", "provenance", "errors", relations.GROUP)

#: Verdicts of runs that were cut short: nothing was measured.
CUT = ("CRASH", "HANG", "OOM", "ERROR")

#: Why a run may fail beside a check: what the kernel raised.
RAISED = ("RAISED", *CODES)


def of_the_verdict(result: Result, book: Book) -> Iterator[str]:
    """What a verdict does not follow from."""
    known = {w.id: w for w in book.waivers}
    if result.waiver and result.waiver not in known:
        yield f"waiver {result.waiver!r} is not in the bundle"
        return
    if bool(result.waiver) != (result.verdict in ("XFAIL", "XPASS")):
        yield f"{result.verdict} {'with' if result.waiver else 'without'} a waiver"
        return
    plain = book.unexcused(result)
    excused = book.judged(plain)
    if (excused.verdict, excused.waiver) != (result.verdict, result.waiver):
        yield f"{result.verdict} by waiver {result.waiver!r}, by the waivers it is {excused.verdict} {excused.waiver!r}"
    yield from _of_the_numbers(plain)


def of_the_culprit(result: Result, failed: Collection[str]) -> Iterator[str]:
    """What does not follow of who damaged a worker. ``failed``: what failed in the bundle, as "CASE on POLICY"."""
    if result.culprit and not result.remark:
        yield f"{result.culprit} is named as the culprit of nothing"
    if result.culprit and result.culprit not in failed:
        yield f"{result.culprit} is named as the culprit, and has not failed"


def _of_the_numbers(r: Result) -> Iterator[str]:
    failed = [name for name, said in r.checks.items() if said.startswith("failed: ")]
    over = [name for name, error in r.errors.items() if not error <= r.budget.get(name, -1.0)]
    odd = [n for n, said in r.checks.items() if said != "ok" and not said.startswith(("failed: ", "n/a: "))]
    if odd:
        yield f"the checks {', '.join(odd)} say neither ok, failed nor n/a"
    if r.errors.keys() != r.budget.keys():
        yield f"errors and budgets are not of the same criteria: {sorted(r.errors.keys() ^ r.budget.keys())}"
    if over and not set(MEASURE) & set(failed):
        first = over[0]
        yield f"{first} is {r.errors[first]:.3g} of {r.budget.get(first, 0.0):.3g}, and accuracy is not failed"
    if not re.fullmatch("[0-9a-f]{64}" if r.checks else "([0-9a-f]{64})?", r.inputs):
        yield f"the inputs are {r.inputs!r:.80}, which is no sha256"
    silent = [name for name in ALWAYS if r.checks.get(name, "").startswith("n/a: ")]
    if silent:
        yield f"the checks {', '.join(silent)} always apply, and say n/a"
    if r.verdict in RAN:
        if not r.checks:
            yield f"{r.verdict} without checks"
        if not r.kernel:
            yield f"{r.verdict} without a kernel"
        if r.verdict == "PASS" and (failed or over or r.code or r.detail):
            yield f"PASS, and {', '.join(failed) or ', '.join(over) or r.code or r.detail} failed"
        if r.verdict == "PASS" and "errors" not in r.checks and "ok" not in [r.checks.get(name) for name in MEASURE]:
            yield "PASS, and accuracy was not judged"
        if r.verdict == "MISTRUSTED" and "accuracy" not in failed:
            yield "MISTRUSTED, and accuracy says nothing of it"
    elif r.verdict == "FAIL":
        if failed and r.code not in failed:
            yield f"FAIL of {r.code!r}, what failed is {', '.join(failed)}"
        elif failed and not r.detail.endswith(r.checks[r.code].removeprefix("failed: ")):
            yield f"its detail is not what {r.code} says"
        elif not failed and r.code not in RAISED:
            yield f"FAIL of {r.code!r}, and no check failed"
    elif r.verdict == "UNSUPPORTED":
        if not r.code or not r.detail:
            yield "UNSUPPORTED without a reason"
        if r.errors or r.checks or r.kernel_seconds:
            yield "UNSUPPORTED, and something was run"
    elif r.verdict in CUT and over:
        yield f"{r.verdict}, and something was measured"


def of_its_case(r: Result, case: Case) -> Iterator[str]:
    """What contradicts the case that a result is of."""
    for name, mine, theirs in (
        ("op", r.op, case.op),
        ("dtype", r.dtype, case.dtype),
        ("level", r.level, case.sample.level),
    ):
        if mine != theirs:
            yield f"{name} is {mine!r}, its case says {theirs!r}"
    wanted = {"errors"} if case.bad is not None else set(CHECKS) if case.relation is None else {relations.GROUP}
    if r.checks and set(r.checks) != wanted:
        yield f"checks are missing or unknown: {', '.join(sorted(set(r.checks) ^ wanted))}"
    outputs = {name.partition(".")[0] for name in r.errors}
    strange = outputs - set(case.spec.accuracy) if case.relation is None else set()
    if strange:
        yield f"errors of {', '.join(sorted(strange))}, which the op does not have"
    unknown = set(r.claims) - set(() if case.relation is not None else case.spec.attributes)
    if unknown:
        yield f"claims {', '.join(sorted(unknown))}, which the op does not have"
    if r.kernel and r.kernel.partition(":")[0] != r.backend.partition(":")[0]:
        yield f"kernel {r.kernel} on {r.backend}"


def of_the_device(manifest: Manifest) -> Iterator[str]:
    """Evidence that the device cannot give."""
    device, host = manifest.device, manifest.host
    if device.evidence != "hardware":
        return
    if device.type == "cpu" and device.arch != host.machine:
        yield f"hardware of type cpu is the host's, which is {host.machine}, not {device.arch}"
    if device.type == "meta":
        yield "nothing is computed on meta"
    build = host.versions.get("torch", "")
    if device.type == "cuda" and build.endswith("+cpu"):
        yield f"torch {build} has no {device.type} device"
    if host.interpreters and any(t.endswith(":triton") for t in manifest.selection.targets):
        yield f"{', '.join(host.interpreters)} was on, so kernels were interpreted"
