"""Whatever a worker does ends its case, with the right verdict, and the run goes on. The workers are scripted."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import scripted

from glm5_hal.conformance.aftermath import culprits
from glm5_hal.conformance.cases import find
from glm5_hal.conformance.plan import Plan, Task
from glm5_hal.conformance.pool import Pool
from glm5_hal.conformance.results import Result
from glm5_hal.errors import HalError

IDS = [f"rms_norm[{dtype}-{sample}]" for sample in ("tokens", "one") for dtype in ("float32", "bfloat16", "float16")]
ONE, TWO, THREE = IDS[:3]
A, B = "scripted:a", "scripted:b"


def pooled(script: Mapping[str, Any], ids: list[str], **how: Any) -> tuple[dict[str, Result], list[Result]]:
    """What the pool says, and what is corrected afterwards."""
    plan = Plan("scripted", json.dumps(script), timeout=20.0, memory=0.0, **how)
    with Pool(plan, scripted.SERVE) as pool:
        policies = tuple(t.policy for t in pool.targets())
        results = list(pool.run([Task(case, policies) for case in find(ids)]))
    known = {(r.case, r.backend): r for r in results}
    return by_key(results), list(culprits(plan, pool.incidents, known, scripted.SERVE))


def judged(script: Mapping[str, Any], ids: list[str] = IDS[:3], **plan: Any) -> list[Result]:
    how = {"timeout": 20.0, "memory": 0.0, **plan}
    with Pool(Plan("scripted", json.dumps(script), **how), scripted.SERVE) as pool:
        policies = tuple(t.policy for t in pool.targets())
        return list(pool.run([Task(case, policies) for case in find(ids)]))


def by_key(results: list[Result]) -> dict[str, Result]:
    found = {f"{r.case} {r.backend}": r for r in results}
    assert len(found) == len(results), "a result came twice"
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended (or ends within some seconds)."""
    for _ in range(500):
        try:
            if Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_one_worker_is_started_once_and_judges_everything() -> None:
    results = judged({})
    assert [(r.case, r.backend, r.verdict) for r in results] == [
        (case, policy, "PASS") for case in IDS[:3] for policy in (A, B)
    ]
    assert len({r.detail for r in results}) == 1, "they came from one process"


ENDS: dict[str, tuple[str, str, str]] = {
    "segv": ("CRASH", "SIGSEGV", "the process ended with SIGSEGV"),
    "abort": ("CRASH", "SIGABRT", "the process ended with SIGABRT"),
    "exit 0": ("CRASH", "EXIT", "the process ended with status 0 and without an answer"),
    "starve": ("OOM", "SIGABRT", "out of memory: the process ended with SIGABRT"),
    "kill itself": ("CRASH", "SIGKILL", "the process ended with SIGKILL"),
    "kill its group": ("CRASH", "SIGTERM", "the process ended with SIGTERM"),
    "kill its parent": ("CRASH", "SIGKILL", "the process ended with SIGKILL"),
    "kill its parent's group": ("CRASH", "SIGKILL", "the process ended with SIGKILL"),
    "bytes": ("CRASH", "PROTOCOL", "the worker sent a frame that begins with"),
    "no json": ("CRASH", "PROTOCOL", "the worker sent a frame that is no JSON"),
    "another case's result": ("CRASH", "PROTOCOL", "a result of 'another'"),
    "a verdict that is none": ("CRASH", "PROTOCOL", "no verdict 'GREAT'"),
    "a number that is none": ("CRASH", "PROTOCOL", "seconds of a result is 'soon'"),
    "a message unasked": ("CRASH", "PROTOCOL", "out of turn"),
}


@pytest.mark.parametrize("deed", ENDS)
def test_an_end_is_its_cases_verdict_and_nobody_elses(deed: str) -> None:
    found = by_key(judged({f"{TWO} {A}": deed}))
    ended = found.pop(f"{TWO} {A}")
    verdict, code, said = ENDS[deed]
    assert (ended.verdict, ended.code) == (verdict, code), ended.detail
    assert said in ended.detail
    assert ended.repro.endswith(f"--backend {A} --case '{TWO}' --seed 0")
    assert {r.verdict for r in found.values()} == {"PASS"}
    assert len(found) == 5


def test_a_kill_that_the_operating_system_owns_up_to_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = itertools.count()
    monkeypatch.setattr("glm5_hal.conformance.process.oom_kills", lambda: next(counts))
    found = by_key(judged({f"{TWO} {A}": "kill itself"}))
    assert (found[f"{TWO} {A}"].verdict, found[f"{TWO} {A}"].code) == ("OOM", "SIGKILL")


def test_the_last_lines_of_the_case_are_kept_and_no_other_cases() -> None:
    found = by_key(judged({f"{ONE} {A}": "shout", f"{TWO} {A}": "segv"}))
    assert found[f"{TWO} {A}"].log == "about to fall"
    assert found[f"{ONE} {A}"].verdict == "PASS"
    assert found[f"{ONE} {A}"].log == ""


@pytest.mark.parametrize("deed", ["hang", "stop"])
def test_a_case_that_does_not_end_is_a_hang(deed: str) -> None:
    found = by_key(judged({f"{TWO} {B}": deed}, timeout=1.0))
    hung = found.pop(f"{TWO} {B}")
    assert (hung.verdict, hung.code, hung.detail) == ("HANG", "TIMEOUT", "did not end within 1 s")
    assert {r.verdict for r in found.values()} == {"PASS"}


def test_a_worker_that_closes_its_channel_crashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm5_hal.conformance.process.GRACE", 0.5)
    found = by_key(judged({f"{TWO} {A}": "close every file"}))
    ended = found.pop(f"{TWO} {A}")
    assert (ended.verdict, ended.detail) == ("CRASH", "the worker closed its channel to the runner")
    assert {r.verdict for r in found.values()} == {"PASS"}


def test_a_failure_that_harms_nobody_keeps_its_worker() -> None:
    found = by_key(judged({f"{ONE} {A}": "fail", f"{ONE} {B}": "refuse"}))
    assert found.pop(f"{ONE} {A}").verdict == "FAIL"
    assert found.pop(f"{ONE} {B}").verdict == "UNSUPPORTED"
    assert len({r.detail for r in found.values()}) == 1


def test_exhausted_memory_is_tried_again_alone_and_its_worker_is_not_used_again() -> None:
    found = by_key(judged({f"{TWO} {A}": "out of memory"}))
    assert found[f"{TWO} {A}"].verdict == "OOM"
    assert found[f"{TWO} {B}"].detail != found[f"{ONE} {A}"].detail
    assert {r.verdict for k, r in found.items() if k != f"{TWO} {A}"} == {"PASS"}


def test_a_poisoned_worker_is_replaced_and_its_next_case_not_blamed() -> None:
    """The poison is in ONE's kernel of a worker that had judged nothing else, so ONE is to blame, and only ONE."""
    found = by_key(judged({f"{ONE} {A}": "poison"}))
    assert found.pop(f"{ONE} {A}").detail == "device lost"
    assert {r.verdict for r in found.values()} == {"PASS"}


def test_a_case_that_fails_on_a_device_that_another_has_lost_is_judged_in_a_fresh_worker() -> None:
    found = by_key(judged({f"{ONE} {A}": "poison the next", f"{TWO} {A}": "pause"}))
    assert {r.verdict for r in found.values()} == {"PASS"}
    assert found[f"{TWO} {A}"].remark.startswith("it gave FAIL (device lost)")


def test_what_fails_in_a_used_worker_alone_is_told_and_not_blamed() -> None:
    """TWO starts a thread that aborts a little later, while THREE is judged: which alone does nothing wrong."""
    found = by_key(judged({f"{TWO} {B}": "abort later", f"{THREE} {A}": "pause"}, timeout=20.0))
    assert {r.verdict for r in found.values()} == {"PASS"}
    told = found[f"{THREE} {A}"].remark
    assert told.startswith("it gave CRASH (the process ended with SIGABRT) after 4 other kernels")
    assert told.endswith(f"the last {TWO} on {B}")


def test_a_kernel_that_damages_its_process_and_passes_is_found_out() -> None:
    """TWO passes and spoils the heap; THREE is the first to allocate from it, and dies of it only after TWO."""
    found, corrected = pooled({f"{TWO} {A}": "spoil the heap", f"{THREE} {A}": "allocate"}, IDS[:4])
    assert {r.verdict for r in found.values()} == {"PASS"}
    culprit, victim = corrected
    assert (victim.case, victim.verdict, victim.culprit) == (THREE, "PASS", f"{TWO} on {A}")
    assert victim.remark == found[f"{THREE} {A}"].remark
    assert (culprit.case, culprit.backend) == (TWO, A)
    assert (culprit.verdict, culprit.code, culprit.ok) == ("CRASH", "AFTERMATH", False)
    assert culprit.detail == (
        f"its process is damaged: {THREE} on {A}, judged next, gave CRASH (the process ended with SIGABRT); "
        "alone it does not"
    )


def test_what_is_known_to_be_wrong_keeps_its_verdict_and_is_named() -> None:
    _, corrected = pooled({f"{TWO} {B}": "fail and spoil", f"{THREE} {A}": "allocate"}, IDS[:3])
    (victim,) = corrected
    assert (victim.case, victim.verdict, victim.culprit) == (THREE, "PASS", f"{TWO} on {B}")


def test_who_has_done_nothing_is_not_convicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies once and never again: nobody's verdict, but it is told."""
    monkeypatch.setenv("ABORTED_ONCE", str(tmp_path / "once"))
    found, corrected = pooled({f"{THREE} {A}": "abort once"}, IDS[:3])
    assert {r.verdict for r in found.values()} == {"PASS"}
    (victim,) = corrected
    assert (victim.case, victim.verdict, victim.culprit) == (THREE, "PASS", "")
    assert victim.remark == f"{found[f'{THREE} {A}'].remark}; none of the last 3 of these kernels does that again"


def test_where_nobody_was_looked_for_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm5_hal.conformance.aftermath.VICTIMS", 0)
    _, corrected = pooled({f"{TWO} {A}": "spoil the heap", f"{THREE} {A}": "allocate"}, IDS[:3])
    (victim,) = corrected
    assert (victim.verdict, victim.culprit) == ("PASS", "")
    assert victim.remark.endswith("who did that was not looked for: 0 incidents were looked into before")


@pytest.mark.parametrize(
    ("deed", "gave"),
    [
        ("exit afterwards", "CRASH (the process ended with status 3 and without an answer)"),
        ("abort later", "CRASH (the process ended with SIGABRT)"),
    ],
)
def test_a_kernel_whose_process_ends_when_it_has_passed_is_found_out(deed: str, gave: str) -> None:
    """Between two cases, or, the other worker being busy, while there is nothing more to do."""
    pause = dict.fromkeys((f"{ONE} {A}", f"{TWO} {A}", f"{TWO} {B}"), "pause")
    found, corrected = pooled({f"{ONE} {B}": deed, **pause}, [ONE, TWO], workers=2)
    assert {r.verdict for r in found.values()} == {"PASS"}
    assert not any(r.remark for r in found.values())
    (culprit,) = corrected
    assert (culprit.case, culprit.backend, culprit.verdict, culprit.code) == (ONE, B, "CRASH", "AFTERMATH")
    assert culprit.detail == f"its process is damaged: it gave {gave} afterwards, when no kernel was running"


def test_a_death_after_the_last_case_is_seen() -> None:
    plan = Plan("scripted", json.dumps({f"{ONE} {B}": "abort later"}), timeout=20.0, memory=0.0)
    with Pool(plan, scripted.SERVE) as pool:
        pool.targets()
        for result in pool.run([Task(case, (A, B)) for case in find([ONE])]):
            if result.backend == B:
                time.sleep(1.5)
    (incident,) = pool.incidents
    assert (incident.case.id, incident.policy, incident.idle) == (ONE, B, True)
    assert incident.remark == (
        "its worker gave CRASH (the process ended with SIGABRT) when it and 1 other kernels had run there and none was "
        "running"
    )


def test_a_death_between_two_cases_that_never_comes_again_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABORTED_ONCE", str(tmp_path / "once"))
    monkeypatch.setattr("glm5_hal.conformance.aftermath.WATCHED", 0.5)
    pause = dict.fromkeys((f"{ONE} {A}", f"{TWO} {A}", f"{TWO} {B}"), "pause")
    _, corrected = pooled({f"{ONE} {B}": "abort once, later", **pause}, [ONE, TWO], workers=2)
    (last,) = corrected
    assert (last.case, last.backend, last.verdict, last.culprit) == (ONE, B, "PASS", "")
    assert last.remark.endswith("none was running; none of these kernels does that again")


def test_a_death_between_cases_is_nobodys_verdict() -> None:
    found = by_key(judged({f"{ONE} {A}": "fail", TWO: "exit 0 once"}))
    assert found.pop(f"{ONE} {A}").verdict == "FAIL"
    assert {r.verdict for r in found.values()} == {"PASS"}


def test_a_suite_that_dies_before_any_kernel_ran_is_an_error_of_its_own() -> None:
    found = by_key(judged({TWO: "segv"}))
    for policy in (A, B):
        ended = found.pop(f"{TWO} {policy}")
        assert (ended.verdict, ended.kernel) == ("ERROR", "")
        assert "the suite itself failed: the process ended with SIGSEGV" in ended.detail
    assert {r.verdict for r in found.values()} == {"PASS"}


def test_several_workers_share_the_cases_over_the_devices() -> None:
    pause = {f"{case} {A}": "pause" for case in IDS}
    results = judged(pause, IDS, workers=2, devices=("cpu:0", "cpu:1"))
    by_key(results)
    assert len(results) == 12
    assert len({r.detail for r in results}) == 2


def test_fewer_workers_than_devices_are_refused() -> None:
    with pytest.raises(HalError, match="1 workers cannot use 2 devices") as raised:
        Plan("scripted", devices=("cpu:0", "cpu:1"), workers=1)
    assert raised.value.fix == "--workers 2, or more"


def test_devices_that_differ_are_refused() -> None:
    with pytest.raises(HalError, match="different backends, devices or code") as raised:
        judged({"differ": True, f"{ONE} {A}": "pause"}, IDS, devices=("cpu:0", "cpu:1"))
    assert raised.value.code == "UNAVAILABLE"


@pytest.mark.parametrize(("deed", "said"), [("segv", "SIGSEGV; its last words: about to fall"), ("exit 0", "status 0")])
def test_a_backend_that_kills_its_worker_at_the_start_is_unavailable(deed: str, said: str) -> None:
    with pytest.raises(HalError) as raised:
        judged({"start": deed})
    assert raised.value.code == "UNAVAILABLE"
    assert "cannot be started: the process ended with" in raised.value.what
    assert said in raised.value.what
    assert raised.value.fix.startswith("mend "), "the doctor never sees a plugin that is given"


def test_nothing_that_a_kernel_started_outlives_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "left"
    left.touch()
    monkeypatch.setenv("LEFT_BEHIND", str(left))
    found = by_key(judged({f"{ONE} {A}": "leave children", f"{TWO} {A}": "fork and return"}))
    assert {r.verdict for r in found.values()} == {"PASS"}
    pids = [int(pid) for pid in left.read_text(encoding="ascii").split()]
    assert len(pids) == 2
    assert all(map(gone, pids))


RUNNER = """
import sys, test_pool as t
print(t.os.getpid(), flush=True)
from glm5_hal.conformance.plan import Plan, Task
from glm5_hal.conformance.pool import Pool
with Pool(Plan("scripted", sys.argv[1], memory=0.0), "scripted:serve") as pool:
    pool.targets()
    print("started", flush=True)
    list(pool.run([Task(c, (t.A,)) for c in t.find([t.ONE])]))
"""


def test_no_worker_outlives_a_runner_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / "left"
    left.touch()
    monkeypatch.setenv("LEFT_BEHIND", str(left))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(scripted.__file__).parent)]))
    script = json.dumps({f"{ONE} {A}": "leave children and hang"})
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, script], stdout=subprocess.PIPE, text=True)
    try:
        while len(left.read_text(encoding="ascii").split()) < 3:
            assert runner.poll() is None
            time.sleep(0.02)
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.communicate()
    pids = [int(pid) for pid in left.read_text(encoding="ascii").split()]
    assert all(map(gone, pids)), "the worker, its child and its daemon"
