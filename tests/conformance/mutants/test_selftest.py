"""The self test: what it demands, what it reports, and that it passes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glm5_hal import ops
from glm5_hal.cli import app
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.mutants import matrix, mechanical, selftest, wrong
from glm5_hal.conformance.mutants.selftest import Mutant, Outcome, Report
from glm5_hal.errors import HalError

PAGE = Path(__file__).resolve().parents[3] / "docs/kill-matrix.md"

HAND = Mutant("rope-wrong", "hand", "elementary", "0" * 12, ("rope",))
MACHINE = Mutant("elementary:1:2:drop", "mechanical", "drop", "1" * 12, ("rope",), {"rope": ["rope[a]"]})
DEAD = Outcome(HAND, ("accuracy", "rerun"), "accuracy", "rope[a]")


def report(*outcomes: Outcome, alarms: tuple[str, ...] = (), stale: tuple[str, ...] = ()) -> Report:
    return Report(outcomes, alarms, {"kernels": 1, "seeds": 1, "cases": 1}, stale, "full")


# --- what it demands -------------------------------------------------------------------------------------------------


def test_all_killed_and_no_false_alarm_is_a_success() -> None:
    found = report(DEAD, Outcome(MACHINE, ("raises",), "raises"))
    assert found.ok
    assert (found.mutants, found.as_dict()["killed"], found.as_dict()["mechanical"]) == (2, 2, 1)


@pytest.mark.parametrize(
    "found",
    [
        report(),
        report(DEAD, Outcome(MACHINE)),
        report(DEAD, alarms=("plain: rope[a] seed 3: FAIL",)),
        report(DEAD, stale=("an argument about code that has changed",)),
        report(DEAD, Outcome(replace(MACHINE, why="harmless"), ("accuracy",), "accuracy")),
        report(DEAD, Outcome(MACHINE, ("error",), "error")),
    ],
    ids=["nothing judged", "survivor", "false alarm", "stale argument", "wrongly argued", "the suite failed"],
)
def test_anything_else_is_a_failure(found: Report) -> None:
    assert not found.ok


@pytest.mark.parametrize(
    ("mutant", "status"),
    [
        (replace(MACHINE, why="harmless"), "equivalent"),
        (replace(MACHINE, ops=(), cases={}), "not executed"),
        (replace(HAND, needs="a check to come"), "pending"),
        (replace(HAND, needs="accuracy"), "survived"),
        (HAND, "survived"),
    ],
)
def test_what_no_check_failed_is_told_apart(mutant: Mutant, status: str) -> None:
    assert Outcome(mutant).status == status
    assert report(DEAD, Outcome(mutant)).mutants == (2 if status == "survived" else 1)


def test_marginal_kills_are_those_of_one_check_alone_and_every_check_is_named() -> None:
    alone = Outcome(MACHINE, ("poison",), "poison")
    found = report(DEAD, alone)
    assert found.marginal()["poison"] == [MACHINE.id]
    assert found.marginal()["accuracy"] == []
    assert set(CHECKS) <= set(found.marginal())
    assert found.matrix() == {"accuracy": {"elementary": 1}, "rerun": {"elementary": 1}, "poison": {"drop": 1}}


@pytest.mark.parametrize("how", [{"level": "whole"}, {"only": ("no_such_op",)}])
def test_a_name_that_does_not_exist_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(HalError, match="no "):
        selftest.run(**how)


# --- what there is ---------------------------------------------------------------------------------------------------


def test_there_are_enough_mutants_and_half_of_them_are_mechanical() -> None:
    argued = mechanical.equivalents().why
    machine = [m for m in mechanical.all_mutants() if m.digest not in argued]
    assert len(machine) + len(wrong.ALL) >= 120
    assert len(machine) >= len(wrong.ALL)


@pytest.mark.parametrize("op", ops.names())
def test_every_op_has_wrong_kernels_made_by_hand(op: str) -> None:
    assert len([w for w in wrong.ALL if w.op == op]) >= 10


def test_ids_of_wrong_kernels_are_unique() -> None:
    ids = [w.id for w in wrong.ALL]
    assert len(set(ids)) == len(ids)


def test_a_cheat_that_survives_today_names_what_will_find_it() -> None:
    assert {w.needs for w in wrong.THEMES["cheats"] if w.needs} == {"shadow mode"}


# --- the run ---------------------------------------------------------------------------------------------------------


def test_the_quick_self_test_passes(tmp_path: Path) -> None:
    command = ["conformance", "selftest", "--level", "quick", "--json", "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, command)
    found = json.loads(ran.stdout)
    assert ran.exit_code == 0, [found[key] for key in ("survivors", "alarms", "stale", "wrongly_argued")]
    assert found["mutants"] == found["killed"] >= 120
    assert found["mechanical"] > found["mutants"] * 0.4  # a sample: of the whole it is half, see the page
    assert found["false_alarms"] == 0
    assert {"accuracy", "form", "raises"} <= found["matrix"].keys()
    assert json.loads((tmp_path / "selftest.json").read_text()) == found


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_names_every_check_and_what_survives() -> None:
    pending = Outcome(replace(HAND, id="rope-cheat", needs="fuzz"))
    page = matrix.page(report(DEAD, Outcome(MACHINE, ("raises",), "raises"), pending))
    assert all(f"| {check} |" in page for check in CHECKS)
    assert "| accuracy | 1 | 1 |" in page  # one of the theme, one in all
    assert "| accuracy | 1 | 0 | `layout` measures again" in page
    assert "| `rope-cheat` | fuzz |" in page


def test_half_of_what_is_killed_is_changed_by_machine() -> None:
    numbers = re.search(r"(\d+) mutants, (\d+) killed \((\d+) made by hand, (\d+) mechanical", PAGE.read_text("utf-8"))
    assert numbers is not None
    mutants, killed, _, mechanical = map(int, numbers.groups())
    assert killed == mutants >= 120
    assert 2 * mechanical >= killed


def test_a_check_that_finds_nothing_alone_is_justified() -> None:
    rows = re.findall(r"^\| (\w+) \| \d+ \| 0 \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [check for check, why in rows if why == "nothing"] == []


def test_the_published_page_is_about_these_checks_and_mutants() -> None:
    assert matrix.fingerprint() in PAGE.read_text(encoding="utf-8"), f"stale: run `{matrix.COMMAND}`"
