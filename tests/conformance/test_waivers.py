"""An excuse is narrow, dated and owned, or it is refused; and it excuses what it says and nothing else."""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from datetime import date, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from bundles import TODAY, WAIVED, WAIVER, toml

from glm5_hal import context
from glm5_hal.conformance import waivers
from glm5_hal.conformance.results import Result, succeeded
from glm5_hal.conformance.target import targets
from glm5_hal.conformance.waivers import FIELDS, LONGEST, Book, Waiver, counted, parse
from glm5_hal.errors import HalError

ROOT = Path(__file__).resolve().parents[2]


def book(*entries: dict[str, Any], day: date = TODAY, device: str = "stand-in", driver: str = "2.0") -> Book:
    return Book(parse(toml(*entries)), day, device, {"driver": driver})


def result(verdict: str = "FAIL", case: str = "rms_norm[bfloat16-tokens]", backend: str = "standin:native") -> Result:
    return Result(
        case, case.split("[")[0], backend, backend, verdict, "simulated", "stand-in", "bfloat16", "smoke", 0, ""
    )


# --- what it excuses -------------------------------------------------------------------------------------------------


def test_a_waived_failure_is_xfail_and_lets_the_run_succeed() -> None:
    judged = book(WAIVER).judged(replace(result(), detail="accuracy: off", code="accuracy"))
    assert (judged.verdict, judged.waiver, judged.detail) == ("XFAIL", "norm-scale", "accuracy: off")
    assert succeeded([judged, result("PASS", "rope[bfloat16-tokens]")])


def test_a_waived_pass_is_xpass_and_fails_the_run() -> None:
    judged = book(WAIVER).judged(result("PASS"))
    assert (judged.verdict, judged.waiver) == ("XPASS", "norm-scale")
    assert "take it out of waivers.toml" in judged.detail
    assert not succeeded([judged, result("PASS", "rope[bfloat16-tokens]")])


@pytest.mark.parametrize(
    ("what", "judged"),
    [
        ("another kind of failure", result("CRASH")),
        ("an error of the suite", result("ERROR")),
        ("inputs that prove nothing", result("MISTRUSTED")),
        ("what needs no waiver", result("UNSUPPORTED")),
        ("another case", result(case="rms_norm[float16-tokens]")),
        ("a case whose id goes on", result(case="rms_norm[bfloat16-tokens]x")),
        ("another provider", result(backend="acme:native")),
    ],
)
def test_nothing_else_is_excused(what: str, judged: Result) -> None:
    assert book(WAIVER).judged(judged) == judged, what


@pytest.mark.parametrize(
    ("status", "how"),
    [
        ("", {"day": WAIVER["since"]}),
        ("", {"day": WAIVER["expires"]}),
        ("not yet", {"day": WAIVER["since"] - timedelta(1)}),
        ("expired", {"day": WAIVER["expires"] + timedelta(1)}),
        ("elsewhere", {"device": "stand-in 2"}),
        ("elsewhere", {"driver": "2.1"}),
        ("elsewhere", {"driver": "not a version"}),
    ],
)
def test_it_is_in_force_on_its_days_devices_and_versions_only(status: str, how: dict[str, Any]) -> None:
    mine = book(WAIVER, **how)
    assert mine.status(mine.waivers[0]) == status
    assert mine.judged(result()).verdict == ("FAIL" if status else "XFAIL")
    assert mine.judged(result("PASS")).verdict == ("PASS" if status else "XPASS")


def test_a_version_that_the_probe_does_not_report_is_not_in_range() -> None:
    assert not book(WAIVER).waivers[0].is_for("stand-in", {})


def test_of_several_waivers_the_one_of_the_right_kind_excuses() -> None:
    crash = {**WAIVER, "id": "norm-crash", "kind": "CRASH"}
    assert book(WAIVER, crash).judged(result("CRASH")).waiver == "norm-crash"
    assert book(crash, WAIVER).judged(result("FAIL")).waiver == "norm-scale"


@pytest.mark.parametrize("verdict", ["FAIL", "PASS", "CRASH", "UNSUPPORTED"])
def test_what_was_judged_can_be_undone(verdict: str) -> None:
    mine = book(WAIVER)
    assert mine.unexcused(mine.judged(result(verdict))) == result(verdict)


def test_a_waiver_that_matches_nothing_is_told() -> None:
    entries = [{**WAIVER, "id": name} for name in ("used", "old", "elsewhere")]
    entries[1] |= {"since": TODAY - timedelta(60), "expires": TODAY - timedelta(1)}
    entries[2] |= {"device": "another"}
    idle = {**WAIVER, "id": "idle", "cases": ["rope[*"]}
    mine = book(*entries, idle)
    told = mine.tally([mine.judged(result())])
    assert {t.id: (t.status, t.excused) for t in told} == {
        "used": ("used", 1),
        "old": ("expired", 0),
        "elsewhere": ("elsewhere", 0),
        "idle": ("unused", 0),
    }
    assert counted(told) == "4 waivers, 1 case excused, 1 unused, 1 expired, 1 elsewhere"
    assert counted(()) == ""


# --- what is refused -------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "id of other letters": ({"id": "Norm scale"}, "lower-case"),
    "no case": ({"cases": []}, "list of globs"),
    "cases as text": ({"cases": "rms_norm*"}, "list of globs"),
    "an empty case": ({"cases": [""]}, "globs"),
    "no kernel": ({"kernels": []}, "list of globs"),
    "a kind that cannot be excused": ({"kind": "MISTRUSTED"}, "FAIL, CRASH, HANG, OOM"),
    "no reason": ({"reason": " "}, "no text"),
    "an issue that is no link": ({"issue": "ask Bob"}, "no link"),
    "no owner": ({"owner": ""}, "no text"),
    "no device": ({"device": ""}, "no text"),
    "no version": ({"versions": {}}, "names no version"),
    "a version that is no range": ({"versions": {"driver": "2.x"}}, "no version range"),
    "a date as text": ({"since": "2030-01-01"}, "no date"),
    "a time for a date": ({"expires": datetime(2030, 1, 1)}, "no date"),
    "an end before its beginning": ({"expires": WAIVER["since"] - timedelta(1)}, "90 days"),
    "an end too far off": ({"expires": WAIVER["since"] + LONGEST + timedelta(1)}, "90 days"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_field_names_file_entry_and_fix(name: str) -> None:
    change, said = BAD[name]
    (field,) = change
    good = {**WAIVER, "id": "good"}
    with pytest.raises(HalError) as raised:
        parse(toml(good, {**WAIVER, **change}), "acme/waivers.toml")
    assert raised.value.code == "CONFIG"
    assert raised.value.what.startswith("acme/waivers.toml: waiver 2 (")
    assert f": {field} = " in raised.value.what
    assert said in str(raised.value)
    assert raised.value.fix


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_needed(field: str) -> None:
    entry = {name: value for name, value in WAIVER.items() if name != field}
    with pytest.raises(HalError, match=rf"waiver 1.* has no {field}") as raised:
        parse(toml(entry))
    assert FIELDS[field] in raised.value.fix


def test_a_field_too_many_is_refused_with_the_nearest() -> None:
    with pytest.raises(HalError, match="has a field 'expiry'") as raised:
        parse(toml({**WAIVER, "expiry": WAIVER["expires"]}))
    assert "did you mean 'expires'?" in raised.value.fix


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (toml(WAIVER, WAIVER), "the id of two waivers"),
        ("[[waivers]]\n", "knows nothing of waivers"),
        ("waiver = 1\n", "no array"),
        ("waiver = [1]\n", "is no table"),
        ("[[waiver]\n", "waivers.toml: "),
    ],
)
def test_a_file_of_another_form_is_refused(text: str, said: str) -> None:
    with pytest.raises(HalError) as raised:
        parse(text)
    assert (raised.value.code, bool(raised.value.fix)) == ("CONFIG", True)
    assert said in raised.value.what


def test_the_examples_in_the_error_messages_are_themselves_right() -> None:
    (waiver,) = parse("[[waiver]]\n" + "\n".join(FIELDS.values()))
    assert waiver.expires - waiver.since <= LONGEST
    assert [f.name for f in fields(Waiver)] == list(FIELDS)


def test_the_templates_example_is_right_as_soon_as_it_is_no_comment() -> None:
    template = (ROOT / "backends/_template/src/MODULE/waivers.toml.tmpl").read_text(encoding="utf-8")
    assert parse(template) == ()
    example = "\n".join(line[6:] for line in template.splitlines() if line.startswith("#     "))
    assert [w.id for w in parse(example)] == ["norm-subnormals"]


def test_the_docs_example_is_right() -> None:
    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert [w.id for w in parse(example)] == ["norm-subnormals"]


# --- where they come from --------------------------------------------------------------------------------------------


def test_a_backend_ships_its_own() -> None:
    mine = waivers.book(waivers.shipped("cpu"), "a CPU", {"torch": "2.9"})
    assert (mine.waivers, mine.device) == ((), "a CPU")
    assert mine.text == (ROOT / "backends/cpu/waivers.toml").read_text(encoding="utf-8")


def test_a_plugins_file_lies_beside_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glm5_hal.conformance.mutants.stand_in import installed

    package = tmp_path / "glm5_hal_other"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "waivers.toml").write_text(toml(WAIVER), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import_module("glm5_hal_other")  # as a backend's is where it is judged
    with installed() as catalogue:
        record = next(r for r in catalogue.records if r.name == "standin")
        for value in ("glm5_hal_other", "glm5_hal_other:plugin"):
            context._process.catalogue = type(catalogue)((replace(record, value=value),))
            file, text = waivers.shipped("standin")
            assert (file, text) == (str(package / "waivers.toml"), toml(WAIVER))
            assert [w.id for w in waivers.book((file, text), "x", {}).waivers] == ["norm-scale"]
        context._process.catalogue = type(catalogue)((replace(record, value="nowhere.at.all"),))
        assert waivers.shipped("standin") == ("", "")
        assert waivers.book(("", ""), "x", {}).waivers == ()


PARENT = """
import os
with open({diary!r}, "a") as diary:
    diary.write(f"{{os.getpid()}}\\n")
"""


def test_nothing_of_a_backend_is_imported_where_the_run_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its module nor the package that it lies in: whatever that does, it does to a worker."""
    from glm5_hal.conformance.session import Session, run

    package, diary = tmp_path / "acme_parent", tmp_path / "diary"
    package.mkdir()
    (package / "__init__.py").write_text(PARENT.format(diary=str(diary)), encoding="utf-8")
    (package / "plugin.py").write_text("from bundles import glm5_backend\n", encoding="utf-8")
    (package / "waivers.toml").write_text(toml(WAIVER), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    done = run(Session("", tmp_path / "out", "acme_parent.plugin", cases=(WAIVED,)))
    assert [(r.verdict, r.waiver) for r in done.results] == [("XFAIL", "norm-scale")]
    pids = diary.read_text(encoding="ascii").split()
    assert pids
    assert str(os.getpid()) not in pids


# --- in pytest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "outcome"),
    [("rms_norm[bfloat16-tokens]", pytest.xfail.Exception), ("rms_norm[bfloat16-uneven]", pytest.fail.Exception)],
)
def test_pytest_xfails_what_is_waived_and_fails_the_rest(case: str, outcome: type[BaseException]) -> None:
    import bundles

    from glm5_hal.conformance.cases import find
    from glm5_hal.conformance.pytest_plugin import HalCase

    with bundles.backend():
        (target,) = targets("standin")
        with pytest.raises(outcome, match=r"rms_norm|norm-scale"):
            HalCase(find([case])[0], target, 0, book(WAIVER)).check()


# --- the gate --------------------------------------------------------------------------------------------------------


def gate() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("ci_waivers", ROOT / "ci/waivers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gate_sees_every_file_and_lets_none_pass_that_is_out_of_date(tmp_path: Path) -> None:
    module, file = gate(), tmp_path / "waivers.toml"
    assert ROOT / "backends/cpu/waivers.toml" in module.files()
    assert len(module.files()) >= 2
    file.write_text(toml(WAIVER), encoding="utf-8")
    assert list(module.check(file, WAIVER["expires"])) == []
    (said,) = module.check(file, WAIVER["expires"] + timedelta(1))
    assert "norm-scale expired on" in said
    file.write_text(toml({**WAIVER, "cases": ["rms_nrom[*"]}), encoding="utf-8")
    (said,) = module.check(file, TODAY)
    assert "no case matches 'rms_nrom[*'" in said
    file.write_text(toml({**WAIVER, "owner": ""}), encoding="utf-8")
    (said,) = module.check(file, TODAY)
    assert "owner = ''" in said


def test_no_waiver_of_this_repository_is_out_of_date() -> None:
    assert gate().main() == 0
