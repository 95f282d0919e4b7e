"""A bundle that was altered is found out: by its sums, by what no longer adds up, or by computing cases again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import bundles
import pytest
from bundles import BAD, FAILS, PASSES, TODAY, UNSUPPORTED, WAIVED, WAIVER, manifest, result, toml

from glm5_hal.conformance.bundle import files
from glm5_hal.conformance.bundle.rerun import rerun
from glm5_hal.conformance.bundle.verify import CODES, Problem, verify

Alter = Callable[[Path], Any]


def found(folder: Path, *, again: bool = False) -> list[Problem]:
    problems, bundle = verify(folder)
    if again and bundle is not None:
        problems += rerun(bundle, 100, 0, plugin="bundles").problems
    return problems


def named(problems: list[Problem]) -> set[tuple[str, str]]:
    return {(p.code, p.where) for p in problems}


@pytest.mark.usefixtures("computed_once")
def test_a_bundle_as_it_was_written_holds_together_and_computes_the_same_again(bundle: Path) -> None:
    verdicts = {r["case"]: r["verdict"] for r in bundles.records(bundle)}
    assert [verdicts[c] for c in (PASSES, FAILS, WAIVED, UNSUPPORTED, BAD)] == [
        "PASS", "FAIL", "XFAIL", "UNSUPPORTED", "PASS",
    ]  # fmt: skip
    assert found(bundle, again=True) == []


@pytest.mark.usefixtures("computed_once")
def test_a_rerun_compares_numbers_where_the_device_is_the_same_and_says_where_not(bundle: Path) -> None:
    read = files.read(bundle)
    plugin = "bundles"
    assert rerun(read, 2, 1, plugin=plugin).unlike == ""
    other = replace(read.manifest, device=replace(read.manifest.device, name="another"))
    assert rerun(replace(read, manifest=other), 2, 1, plugin=plugin).unlike == "name stand-in here, another there"
    assert len(rerun(read, 2, 1, plugin=plugin).cases) == 2
    assert rerun(read, 3, 1, plugin=plugin).cases == rerun(read, 3, 1, plugin=plugin).cases
    assert len({rerun(read, 3, n, plugin=plugin).cases for n in range(3)}) > 1


def test_what_passes_by_itself_and_damages_others_is_not_computed_again(bundle: Path) -> None:
    read = files.read(bundle)
    culprits = tuple(replace(r, verdict="CRASH", code="AFTERMATH") for r in read.results)
    assert rerun(replace(read, results=culprits), 5, seed=0, plugin="bundles").cases == ()


# --- altered in more than twenty ways --------------------------------------------------------------------------------


def passed(r: dict[str, Any]) -> None:
    """A failure relabelled by someone who has read the format."""
    r |= {"verdict": "PASS", "code": "", "detail": "", "waiver": ""}
    r["checks"] = {name: "ok" if said.startswith("failed") else said for name, said in r["checks"].items()}


def with_better_numbers(r: dict[str, Any]) -> None:
    passed(r)
    r["errors"] = {name: min(value, 0.5 * r["budget"][name]) for name, value in r["errors"].items()}


def with_wider_budgets(r: dict[str, Any]) -> None:
    passed(r)
    r["budget"] = {name: 1e3 * value for name, value in r["budget"].items()}


def without_criterion(r: dict[str, Any]) -> None:
    passed(r)
    over = [name for name in r["errors"] if not r["errors"][name] <= r["budget"][name]]
    assert over
    for name in over:
        del r["errors"][name], r["budget"][name]


def refused(r: dict[str, Any]) -> None:
    r |= {"verdict": "UNSUPPORTED", "code": "DTYPE", "detail": "x is bfloat16", "kernel": "", "kernel_seconds": 0.0}
    r |= {"errors": {}, "budget": {}, "checks": {}, "claims": [], "work": {}}


def without(case: str) -> Alter:
    return lambda folder: bundles.put(folder, [r for r in bundles.records(folder) if r["case"] != case])


def with_copy(of: str, **changes: Any) -> Alter:
    def alter(folder: Path) -> None:
        known = bundles.records(folder)
        bundles.put(folder, [*known, {**next(r for r in known if r["case"] == of), **changes}])

    return alter


def copied_over(case: str, source: str) -> Alter:
    """A result that is another's, renamed."""

    def alter(folder: Path) -> None:
        known = bundles.records(folder)
        model = next(r for r in known if r["case"] == source)
        keep = ("case", "op", "dtype", "repro", "inputs")
        bundles.put(folder, [{**model, **{k: r[k] for k in keep}} if r["case"] == case else r for r in known])

    return alter


def waivers(*entries: dict[str, Any]) -> Alter:
    return lambda folder: (folder / "waivers.toml").write_text(toml(*entries), encoding="utf-8")


def every(**changes: Any) -> Alter:
    def alter(folder: Path) -> None:
        bundles.put(folder, [{**r, **changes} for r in bundles.records(folder)])

    return alter


def both(*alterations: Alter) -> Alter:
    return lambda folder: [alter(folder) for alter in alterations]


def other_seed(folder: Path) -> None:
    known = bundles.records(folder)
    bundles.put(folder, [{**r, "seed": 7, "repro": r["repro"].replace("--seed 0", "--seed 7")} for r in known])
    manifest(lambda m: m["selection"].update(seed=7))(folder)


def text(name: str, old: str, new: str) -> Alter:
    def alter(folder: Path) -> None:
        before = (folder / name).read_text(encoding="utf-8")
        assert old in before
        (folder / name).write_text(before.replace(old, new, 1), encoding="utf-8")

    return alter


EASY = "rms_norm[bfloat16-easy]"
RESULTS, MANIFEST = files.RESULTS, files.MANIFEST

#: name: (what is done, the file that it touches, the code that names it once everything is sealed again and where).
ALTERED: dict[str, tuple[Alter, str, str, str]] = {
    "a failure is called PASS": (result(FAILS, lambda r: r.update(verdict="PASS")), RESULTS, "VERDICT", FAILS),
    "and its checks ok": (result(FAILS, passed), RESULTS, "VERDICT", FAILS),
    "and its errors lowered": (result(FAILS, with_better_numbers), RESULTS, "RERUN", FAILS),
    "or its budgets raised": (result(FAILS, with_wider_budgets), RESULTS, "RERUN", FAILS),
    "a pass is made to look better": (
        result(PASSES, lambda r: r["errors"].update({"y.row": 1e-9})), RESULTS, "RERUN", PASSES,
    ),
    "a failing criterion is taken out": (
        result(FAILS, lambda r: r["budget"].pop("y.slope")), RESULTS, "VERDICT", FAILS,
    ),
    "or all of it": (result(FAILS, without_criterion), RESULTS, "RERUN", FAILS),
    "UNSUPPORTED is called PASS": (copied_over(UNSUPPORTED, PASSES), RESULTS, "RERUN", UNSUPPORTED),
    "a failure is called UNSUPPORTED": (
        result(FAILS, lambda r: r.update(verdict="UNSUPPORTED", code="DTYPE")), RESULTS, "VERDICT", FAILS,
    ),
    "and nothing of it is left": (result(FAILS, refused), RESULTS, "RERUN", FAILS),
    "UNSUPPORTED gives no reason": (
        result(UNSUPPORTED, lambda r: r.update(code="", detail="")), RESULTS, "VERDICT", UNSUPPORTED,
    ),
    "a check is taken out": (result(PASSES, lambda r: r["checks"].pop("layout")), RESULTS, "RECORD", PASSES),
    "a bad input was not refused": (
        result(BAD, lambda r: r["checks"].update(errors="failed: accepted")), RESULTS, "VERDICT", BAD,
    ),
    "damage is put down to a case that passed": (
        result(PASSES, lambda r: r.update(remark="it gave CRASH", culprit=f"{BAD} on {bundles.TARGET}")),
        RESULTS, "VERDICT", PASSES,
    ),
    "a check that always applies does not": (
        result(PASSES, lambda r: r["checks"].update(rerun="n/a: x")), RESULTS, "VERDICT", PASSES,
    ),
    "a bad input was not judged": (
        result(BAD, lambda r: r["checks"].update(errors="n/a: x")), RESULTS, "VERDICT", BAD,
    ),
    "a claim is made up": (
        result(PASSES, lambda r: r.update(claims=["sorted_indices"])), RESULTS, "RECORD", PASSES,
    ),
    "the inputs are no digest": (result(PASSES, lambda r: r.update(inputs="mine")), RESULTS, "VERDICT", PASSES),
    "the inputs are none": (result(FAILS, lambda r: r.update(inputs="")), RESULTS, "VERDICT", FAILS),
    "a case is taken out": (without(FAILS), RESULTS, "CASES", FAILS),
    "a case is there twice": (with_copy(PASSES), RESULTS, "CASES", PASSES),
    "a case is made up": (with_copy(PASSES, case=EASY), RESULTS, "CASES", EASY),
    "the inputs were others": (result(PASSES, lambda r: r.update(inputs="0" * 64)), RESULTS, "RERUN", PASSES),
    "a claim is taken back": (result(PASSES, lambda r: r.update(claims=[])), RESULTS, "RERUN", PASSES),
    "another kernel served it": (result(PASSES, lambda r: r.update(kernel="cpu:torch")), RESULTS, "RECORD", PASSES),
    "the level is another": (result(PASSES, lambda r: r.update(level="standard")), RESULTS, "RECORD", PASSES),
    "the work is more": (result(PASSES, lambda r: r["work"].update(flops=1e12)), RESULTS, "RERUN", PASSES),
    "the evidence of a case is stronger": (
        result(PASSES, lambda r: r.update(evidence="hardware")), RESULTS, "EVIDENCE", PASSES,
    ),
    "the evidence of all is": (
        both(every(evidence="hardware"), manifest(lambda m: m["device"].update(evidence="hardware"))),
        RESULTS, "EVIDENCE", MANIFEST,
    ),
    "the seed is another": (manifest(lambda m: m["selection"].update(seed=1)), MANIFEST, "RECORD", PASSES),
    "the seed of all is": (other_seed, RESULTS, "RERUN", PASSES),
    "a waiver excuses more": (waivers({**WAIVER, "cases": ["*"]}), "waivers.toml", "VERDICT", FAILS),
    "a waiver is taken out": (waivers(), "waivers.toml", "VERDICT", WAIVED),
    "a waiver had expired": (
        waivers({**WAIVER, "since": TODAY - timedelta(60), "expires": TODAY - timedelta(1)}),
        "waivers.toml", "WAIVER", "waivers.toml",
    ),
    "a waived failure is called PASS": (result(WAIVED, passed), RESULTS, "VERDICT", WAIVED),
    "the suite was not committed": (
        manifest(lambda m: m["suite"].update(clean=False)), MANIFEST, "DIRTY", MANIFEST,
    ),
    "the suite is not known": (
        manifest(lambda m: m["suite"].update(origin="unknown", commit="", clean=False)), MANIFEST, "DIRTY", MANIFEST,
    ),
    "the suite was other code": (manifest(lambda m: m["suite"].update(code="0" * 64)), MANIFEST, "SUITE", MANIFEST),
    "the suite was another version": (
        manifest(lambda m: m["suite"].update(version="9.9")), MANIFEST, "SUITE", MANIFEST,
    ),
    "the spec is another": (manifest(lambda m: m.update(spec="0" * 64)), MANIFEST, "SPEC", MANIFEST),
    "the spec of an op is": (manifest(lambda m: m["specs"].update(rms_norm="0" * 64)), MANIFEST, "SPEC", MANIFEST),
    "other cases were asked for": (
        manifest(lambda m: m["selection"].update(cases=[PASSES])), MANIFEST, "CASES", FAILS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_bundle_is_found_out_by_its_sums(bundle: Path, name: str) -> None:
    alter, touched, _, _ = ALTERED[name]
    alter(bundle)
    assert ("EDITED", touched) in named(found(bundle))


@pytest.mark.usefixtures("computed_once")
@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_bundle_is_found_out_with_all_sums_and_reports_made_anew(bundle: Path, name: str) -> None:
    alter, _, code, where = ALTERED[name]
    alter(bundle)
    bundles.reseal(bundle)
    assert (code, where) in named(found(bundle, again=code == "RERUN"))


def test_it_is_altered_in_more_than_twenty_ways_and_by_every_code() -> None:
    assert len(ALTERED) > 20
    of_files = {"MISSING", "ADDED", "EDITED", "MALFORMED", "COUNTS", "DERIVED"}
    assert {code for _, _, code, _ in ALTERED.values()} | of_files == set(CODES)


# --- files -----------------------------------------------------------------------------------------------------------

SUMMED: dict[str, tuple[Alter, str, str]] = {
    "a report says something else": (text("report.html", "cases fail", "cases pass"), "DERIVED", "report.html"),
    "Markdown does": (text("report.md", "| FAIL | 1 |", "| FAIL | 0 |"), "DERIVED", "report.md"),
    "JUnit does": (text("junit.xml", 'failures="1"', 'failures="0"'), "DERIVED", "junit.xml"),
    "the counts are others": (manifest(lambda m: m["counts"].update(FAIL=0)), "COUNTS", MANIFEST),
    "the number of cases is another": (manifest(lambda m: m.update(cases=6)), "COUNTS", MANIFEST),
    "a waiver was not used": (manifest(lambda m: m["waivers"][0].update(excused=0)), "COUNTS", MANIFEST),
    "a line is cut": (text(RESULTS, '"schema": 1}', '"sch'), "MALFORMED", RESULTS),
    "a field is unknown": (result(PASSES, lambda r: r.update(note="fine")), "MALFORMED", RESULTS),
    "a verdict is unknown": (result(PASSES, lambda r: r.update(verdict="GOOD")), "MALFORMED", RESULTS),
    "a number is none": (result(PASSES, lambda r: r["errors"].update({"y.row": "tiny"})), "MALFORMED", RESULTS),
    "a number is no number": (result(PASSES, lambda r: r.update(seconds=True)), "MALFORMED", RESULTS),
    "a field is missing": (result(PASSES, lambda r: r.pop("remark")), "MALFORMED", RESULTS),
    "the start is a number": (manifest(lambda m: m.update(started=5)), "MALFORMED", MANIFEST),
    "the start is no time": (manifest(lambda m: m.update(started="today")), "MALFORMED", MANIFEST),
    "the end is nowhere's time": (manifest(lambda m: m.update(ended="2030-01-01T00:00:00")), "MALFORMED", MANIFEST),
    "the specs are a list": (manifest(lambda m: m.update(specs=[])), "MALFORMED", MANIFEST),
    "the evidence is unknown": (manifest(lambda m: m["device"].update(evidence="hearsay")), "MALFORMED", MANIFEST),
    "an op is a number": (manifest(lambda m: m["selection"].update(ops=[1])), "MALFORMED", MANIFEST),
    "a waiver is a text": (manifest(lambda m: m.update(waivers=["norm-scale"])), "MALFORMED", MANIFEST),
    "no thread computed": (manifest(lambda m: m["host"].update(threads=0)), "MALFORMED", MANIFEST),
    "the manifest lacks a part": (manifest(lambda m: m.pop("device")), "MALFORMED", MANIFEST),
    "the manifest is no JSON": (text(MANIFEST, "{", "["), "MALFORMED", MANIFEST),
    "a waiver breaks a rule": (text("waivers.toml", "expires", "until"), "MALFORMED", "waivers.toml"),
}


@pytest.mark.parametrize("name", SUMMED)
def test_what_does_not_add_up_is_found_with_the_sums_made_anew(bundle: Path, name: str) -> None:
    alter, code, where = SUMMED[name]
    alter(bundle)
    files.seal(bundle)
    assert (code, where) in named(found(bundle))


JUNK: tuple[Any, ...] = (None, True, -1, 10**400, 1e300, "\0", [], [[1]], {}, {"a": None})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something may be put in a manifest or a result."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def put_at(value: Any, path: tuple[Any, ...], junk: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = junk


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:10])
def test_nothing_in_a_manifest_ends_in_a_traceback(bundle: Path, junk: Any) -> None:
    whole = (bundle / MANIFEST).read_bytes()
    for path in places(json.loads(whole)):
        if path[0] == "specs" and path[1:] not in ((), ("rope",)):
            continue  # they are all alike
        (bundle / MANIFEST).write_bytes(whole)
        manifest(lambda m, path=path: put_at(m, path, junk))(bundle)
        problems, _ = verify(bundle)
        assert problems, path


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:10])
def test_nothing_in_a_result_ends_in_a_traceback(bundle: Path, junk: Any) -> None:
    whole = (bundle / RESULTS).read_bytes()
    for path in places(next(r for r in bundles.records(bundle) if r["case"] == FAILS)):
        (bundle / RESULTS).write_bytes(whole)
        result(FAILS, lambda r, path=path: put_at(r, path, junk))(bundle)
        problems, _ = verify(bundle)
        assert problems, path


@pytest.mark.parametrize("name", files.NAMES)
def test_a_file_that_is_missing_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert ("MISSING", name) in named(found(bundle))


def test_what_kernels_say_does_not_break_the_lines(bundle: Path) -> None:
    said = "line\u2028separator\x85 and \x1c"
    result(FAILS, lambda r: r.update(detail=said))(bundle)
    assert next(r.detail for r in files.read(bundle).results if r.case == FAILS) == said


def test_a_file_too_many_is_named(bundle: Path) -> None:
    (bundle / "deep").mkdir()
    (bundle / "deep/note.txt").write_text("fine")
    assert named(found(bundle)) == {("ADDED", "deep/note.txt")}


@pytest.mark.parametrize("line", ["", "junk\n", f"{'0' * 64}  ../elsewhere\n"])
def test_sums_that_are_not_of_the_files_are_named(bundle: Path, line: str) -> None:
    (bundle / files.SUMS).write_text(line)
    assert ("MALFORMED", files.SUMS) in named(found(bundle))


def test_a_waiver_that_expires_after_the_run_is_named_while_cases_rely_on_it(bundle: Path) -> None:
    problems, _ = verify(bundle, today=TODAY + timedelta(31))
    assert named(problems) == {("WAIVER", "waivers.toml")}
    assert "rely on it" in problems[0].what


def test_every_problem_has_a_code_that_is_explained(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(b"\xff")
    for problem in found(bundle):
        assert problem.code in CODES
        assert str(problem).startswith(problem.code)


def test_the_docs_name_every_code_and_file() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/conformance.md").read_text(encoding="utf-8")
    for word in (*CODES, *files.NAMES):
        assert word in text
