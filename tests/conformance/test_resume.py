"""What is finished is never done again, and what is resumed is the same run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import hostile
import pytest
from bundles import TODAY, WAIVER, read, toml

from glm5_hal.backend import Device
from glm5_hal.conformance import journal
from glm5_hal.conformance.identity import differences
from glm5_hal.conformance.results import Result, from_record
from glm5_hal.conformance.session import Session, _Run
from glm5_hal.conformance.target import Target
from glm5_hal.errors import HalError

IDENTITY = {"level": "smoke", "seed": 0, "versions": {"torch": "2.13.0"}}
RESULT = Result("a[x]", "a", "b:n", "b:n", "PASS", "simulated", "none", "float32", "smoke", 0, "again")
KEYS = [(f"a[{n}]", "b:n") for n in range(4)]
RESULTS = [replace(RESULT, case=case) for case, _ in KEYS]


def written(folder: Path, results: list[Result], **more: Any) -> None:
    """A run that was cut off after these results."""
    with journal.opened(folder, IDENTITY, resume=False, **more) as begun:
        for result in results:
            begun.add(result)


# --- the journal -----------------------------------------------------------------------------------------------------


def test_a_run_that_is_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    written(tmp_path, [RESULTS[2], RESULTS[0]])
    assert not (tmp_path / "results.jsonl").exists()
    with journal.opened(tmp_path, IDENTITY, resume=True) as again:
        assert again.results.keys() == {KEYS[2], KEYS[0]}
        again.add(RESULTS[3])
        again.add(RESULTS[1])
        assert again.finish(KEYS) == RESULTS
    assert [r["case"] for r in read(tmp_path / "results.jsonl")] == [case for case, _ in KEYS], "in case order"
    assert not (tmp_path / "results.partial.jsonl").exists()


def test_a_line_that_was_torn_off_is_dropped_and_written_again(tmp_path: Path) -> None:
    written(tmp_path, RESULTS[:2])
    partial = tmp_path / "results.partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:-20])
    with journal.opened(tmp_path, IDENTITY, resume=True) as again:
        assert list(again.results) == KEYS[:1]
        again.add(RESULTS[1])
    assert [r["case"] for r in read(partial)] == [case for case, _ in KEYS[:2]]


@pytest.mark.parametrize("kept", range(0, 60, 7))
def test_a_file_cut_anywhere_in_its_first_line_is_an_empty_one(tmp_path: Path, kept: int) -> None:
    written(tmp_path, RESULTS[:1])
    partial = tmp_path / "results.partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:kept])
    with journal.opened(tmp_path, IDENTITY, resume=True) as again:
        assert not again.results
        again.add(RESULTS[0])
    assert len(read(partial)) == 1


def test_a_line_that_is_no_result_is_refused_by_its_number(tmp_path: Path) -> None:
    written(tmp_path, RESULTS[:2])
    partial = tmp_path / "results.partial.jsonl"
    partial.write_text(partial.read_text(encoding="utf-8").replace('"PASS"', '"GREAT"', 1), encoding="utf-8")
    with (
        pytest.raises(HalError, match=r"line 1 is no result \(no verdict 'GREAT'\)"),
        journal.opened(tmp_path, IDENTITY, resume=True),
    ):
        pass


def test_numbers_that_are_none_survive_the_disk(tmp_path: Path) -> None:
    odd = replace(RESULT, errors={"y.row": float("nan"), "y.mean": float("inf")}, budget={"y.row": 0.5})
    again = from_record(json.loads(odd.as_json()))
    assert again.as_json() == odd.as_json()
    assert again.errors["y.mean"] == float("inf")
    assert again.errors["y.row"] != again.errors["y.row"]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"level": "full"}, "level was smoke and is full"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"versions": {"torch": "2.14.0"}}, "versions.torch was 2.13.0 and is 2.14.0"),
        ({"versions": {"torch": "2.13.0", "triton": "3"}}, "versions.triton was None and is 3"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(tmp_path: Path, now: dict[str, Any], said: str) -> None:
    written(tmp_path, RESULTS[:1])
    before = (tmp_path / "results.partial.jsonl").read_bytes()
    with pytest.raises(HalError) as raised, journal.opened(tmp_path, {**IDENTITY, **now}, resume=True):
        pass
    assert raised.value.code == "CONFIG"
    assert said in raised.value.what
    assert (tmp_path / "results.partial.jsonl").read_bytes() == before


def test_a_hash_is_named_by_its_beginning() -> None:
    assert differences({"suite": "a" * 64}, {"suite": "b" * 64}) == ["suite was aaaaaaaaaaaa… and is bbbbbbbbbbbb…"]


def test_results_of_nobody_knows_which_run_are_refused(tmp_path: Path) -> None:
    written(tmp_path, RESULTS[:1])
    (tmp_path / "run.json").unlink()
    with pytest.raises(HalError, match=r"no run\.json"), journal.opened(tmp_path, IDENTITY, resume=True):
        pass


def test_where_nothing_was_begun_a_resumed_run_is_a_new_one(tmp_path: Path) -> None:
    with journal.opened(tmp_path / "new", IDENTITY, resume=True) as begun:
        assert not begun.results


def test_a_run_that_was_complete_is_complete(tmp_path: Path) -> None:
    written(tmp_path, RESULTS)
    for _ in range(2):
        with journal.opened(tmp_path, IDENTITY, resume=True) as again:
            assert again.finish(KEYS) == RESULTS


def test_a_new_run_forgets_the_old_one(tmp_path: Path) -> None:
    written(tmp_path, RESULTS)
    (tmp_path / "junit.xml").touch()
    with journal.opened(tmp_path, {**IDENTITY, "seed": 1}, resume=False) as begun:
        assert not begun.results
        assert {p.name for p in tmp_path.iterdir()} == {"run.json", "results.partial.jsonl"}


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        journal.opened(tmp_path, IDENTITY, resume=False),
        pytest.raises(HalError, match="another run is writing"),
        journal.opened(tmp_path, IDENTITY, resume=True),
    ):
        pass


def test_a_run_starts_once_however_often_it_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(["2030-01-01T00:00:00+00:00", "2030-01-02T00:00:00+00:00"])
    monkeypatch.setattr(journal, "now", lambda: next(times))
    written(tmp_path, RESULTS[:1])
    with journal.opened(tmp_path, IDENTITY, resume=True) as again:
        assert again.started == "2030-01-01T00:00:00+00:00"


# --- waivers ---------------------------------------------------------------------------------------------------------

FAILED = replace(RESULT, case="rms_norm[bfloat16-tokens]", verdict="FAIL", code="accuracy", detail="off")
FACTS = Device("npu", "stand-in", "x", versions={"driver": "2.0"})


def kept(folder: Path, results: Iterator[Result], waiver: dict[str, Any], **more: Any) -> list[Result]:
    """A run that writes no bundle, of what is not yet in the journal."""
    shipped = ("waivers.toml", toml({**waiver, "kernels": ["*"]}))
    run = _Run(Session("b", folder, replays=(folder,)), [Target("b", "n", "npu", FACTS)], shipped)
    with journal.opened(folder, IDENTITY, resume=True) as begun:
        left = (r for r in results if (r.case, r.backend) not in begun.results)
        return run.kept(begun, [(FAILED.case, FAILED.backend)], left, **more).results


def interrupted(*results: Result) -> Iterator[Result]:
    yield from results
    raise KeyboardInterrupt


def test_a_waiver_that_expires_while_a_run_is_interrupted_excuses_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, interrupted(FAILED), WAIVER)
    assert [r["verdict"] for r in read(tmp_path / "results.partial.jsonl")] == ["FAIL"], "as it was"
    expired = {**WAIVER, "since": TODAY - timedelta(60), "expires": TODAY - timedelta(1)}
    assert kept(tmp_path, iter([FAILED]), expired) == [FAILED]


def test_a_complete_run_that_is_gone_on_with_is_held_against_its_waivers_anew(tmp_path: Path) -> None:
    (excused,) = kept(tmp_path, iter([FAILED]), WAIVER)
    assert (excused.verdict, excused.waiver) == ("XFAIL", "norm-scale")
    assert kept(tmp_path, iter([FAILED]), WAIVER) == [excused]
    expired = {**WAIVER, "since": TODAY - timedelta(60), "expires": TODAY - timedelta(1)}
    assert kept(tmp_path, iter([FAILED]), expired) == [FAILED]
    kept(tmp_path / "other", iter([FAILED]), WAIVER)
    with pytest.raises(HalError, match="waiver 'norm-scale', which is gone"):
        kept(tmp_path / "other", iter([FAILED]), {**WAIVER, "id": "another"})


def test_a_crash_that_is_found_afterwards_is_under_no_waiver_of_the_failure_that_it_replaces(tmp_path: Path) -> None:
    crash = replace(FAILED, verdict="CRASH", code="AFTERMATH")
    partial, seen = tmp_path / "results.partial.jsonl", []

    def corrections() -> Iterator[Result]:
        seen.extend(from_record(r) for r in read(partial))
        yield crash

    assert kept(tmp_path, iter([FAILED]), WAIVER, corrections=corrections) == [crash]
    assert seen == [FAILED]


# --- runners that are killed -----------------------------------------------------------------------------------------

#: How often the runner is killed before it is let through.
KILLS = int(os.environ.get("RESUME_KILLS", "2"))


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    file = tmp_path / "hostile.py"
    file.write_text(Path(hostile.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return str(file)


def started(plugin: str, out: Path, *words: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "glm5_hal", "conformance", "run", "--plugin", plugin, "--op", "topk_indices"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GLM5_")}
    return subprocess.Popen(
        [*command, "--out", str(out), *words],
        env=inherited | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def verdicts(out: Path) -> list[tuple[str, str, str]]:
    return [(r["case"], r["verdict"], r["inputs"]) for r in read(out / "results.jsonl")]


def workers_of(diary: Path) -> set[int]:
    text = diary.read_text(encoding="ascii") if diary.exists() else ""
    return {int(line.split()[1]) for line in text.splitlines() if line.count(" ") == 1}


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def lines(partial: Path) -> list[str]:
    """The whole lines."""
    return partial.read_text(encoding="utf-8").split("\n")[:-1] if partial.exists() else []


def test_a_runner_that_is_killed_anywhere_repeats_nothing_and_ends_with_the_same_verdicts(
    plugin: str, tmp_path: Path
) -> None:
    whole, out, diary = tmp_path / "whole", tmp_path / "out", tmp_path / "diary"
    undisturbed = started(plugin, whole)
    out_err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, out_err
    seed = random.randrange(1 << 32)
    expected, partial, rng = verdicts(whole), out / "results.partial.jsonl", random.Random(seed)
    for kill in range(KILLS):
        kept = lines(partial)
        until = len(kept) + rng.randrange(-1, max(1, len(expected) // KILLS))
        runner = started(plugin, out, "--resume", HOSTILE_DIARY=str(diary))
        deadline = time.monotonic() + rng.uniform(0, 3) if until < len(kept) else time.monotonic() + 300
        while len(lines(partial)) <= until and time.monotonic() < deadline and runner.poll() is None:
            time.sleep(0.005)
        runner.send_signal(signal.SIGKILL)
        runner.communicate()
        now = lines(partial)
        assert now[: len(kept)] == kept, f"seed {seed}, kill {kill}: what was written is written"
        end = time.monotonic() + 10
        while any(map(running, workers_of(diary))):
            assert time.monotonic() < end, "a worker outlives its runner"
            time.sleep(0.02)
    kept = [json.loads(line) for line in lines(partial)]
    last = started(plugin, out, "--resume", "--json")
    said, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert json.loads(said)["cases"] == len(expected)
    assert verdicts(out) == expected, f"seed {seed}"
    seconds = {r["case"]: r["seconds"] for r in read(out / "results.jsonl")}
    assert {r["case"]: r["seconds"] for r in kept}.items() <= seconds.items(), "no finished case ran again"
    assert not partial.exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_runner_that_is_asked_to_end_says_how_to_go_on(plugin: str, tmp_path: Path, sent: signal.Signals) -> None:
    out, diary = tmp_path / "out", tmp_path / "diary"
    runner = started(plugin, out, HOSTILE_DIARY=str(diary))
    while len(lines(out / "results.partial.jsonl")) < 3:
        assert runner.poll() is None
        time.sleep(0.01)
    runner.send_signal(sent)
    _, errors = runner.communicate(timeout=60)
    assert runner.returncode == 130
    assert "the same command with --resume goes on" in errors
    assert not any(map(running, workers_of(diary)))
    assert len(lines(out / "results.partial.jsonl")) >= 3
    if sent is signal.SIGINT:  # and only with the same command
        other = started(plugin, out, "--resume", "--seed", "1")
        said, errors = other.communicate(timeout=60)
        assert (other.returncode, said) == (2, "")
        assert "holds another run: seed was 0 and is 1" in errors
