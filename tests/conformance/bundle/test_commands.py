"""The commands on bundles: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundles
import pytest
import torch
from bundles import FAILS, PASSES, result

from glm5_hal import cli
from glm5_hal.conformance import folder
from glm5_hal.conformance.bundle import files, manifest, verify

Run = Callable[..., tuple[Any, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: its exit code and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["glm5-hal", "conformance", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code, said.out + said.err

    return call


def test_a_run_writes_a_bundle_that_verifies(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (manifest, verify):
        monkeypatch.setattr(module, "suite", bundles.committed)
    code, said = run("run", "--backend", "cpu:torch", "--case", PASSES, "--out", tmp_path / "out")
    assert (code, "report.html" in said) == (0, True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*files.NAMES, folder.RUN}
    limits = files.read(tmp_path / "out").manifest.limits
    assert limits.bytes_per_second > 0
    assert limits.flops_per_second.keys() == {"float32"}
    code, said = run("verify", tmp_path / "out", "--rerun", 5)
    assert (code, "consistent" in said, "not signed" in said) == (0, True, True)
    assert "Computed 1 cases again" in said


def test_the_manifest_says_how_many_threads_the_kernels_had(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)  # which two workers share
    threads = torch.get_num_threads()
    try:
        code, _ = run("run", "--case", "rms_norm[float32-glm5-kv_lora]", "--workers", 2, "--out", tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert (code, files.read(tmp_path).manifest.host.threads) == (0, 3)


def test_verify_exits_4_and_names_what_is_wrong(run: Run, bundle: Path) -> None:
    assert run("verify", bundle)[0] == 0
    result(FAILS, lambda r: r.update(verdict="PASS"))(bundle)
    code, said = run("verify", bundle)
    assert code == 4
    assert f"VERDICT  {FAILS}: " in said
    code, said = run("verify", bundle, "--json")
    found = json.loads(said)
    assert (code, found["ok"], found["rerun"]) == (4, False, None)
    assert {"code", "where", "what"} == found["problems"][0].keys()
    assert "not that it is honest" in found["note"]


def test_verify_computes_cases_again_and_says_which_choice_it_was(run: Run, bundle: Path) -> None:
    result(PASSES, lambda r: r["errors"].update({"y.row": 1e-12}))(bundle)
    bundles.reseal(bundle)
    assert run("verify", bundle)[0] == 0
    code, said = run("verify", bundle, "--rerun", 100, "--seed", 3, "--plugin", "bundles", "--json")
    found = json.loads(said)
    assert (code, found["rerun"]["seed"], len(found["rerun"]["cases"])) == (4, 3, 7)
    assert {(p["code"], p["where"]) for p in found["problems"]} == {("RERUN", PASSES)}


def test_verify_needs_the_backend_to_compute_again(run: Run, bundle: Path) -> None:
    code, said = run("verify", bundle, "--rerun", 1)
    assert (code, "no backend 'standin'" in said) == (2, True)


def test_a_folder_that_is_none_is_a_usage_error(run: Run, tmp_path: Path) -> None:
    for words in (("verify", tmp_path / "x"), ("report", tmp_path / "x"), ("diff", tmp_path / "x", tmp_path)):
        code, said = run(*words)
        assert (code, "is no folder" in said, "fix: " in said) == (2, True, True)
    assert run("report", tmp_path)[0] == 2
    assert run("verify", tmp_path)[0] == 4, "an empty folder is an invalid bundle"


def test_diff_exits_1_where_verdicts_differ(run: Run, bundle: Path, pristine: Path) -> None:
    assert run("diff", pristine, bundle)[0] == 0
    result(FAILS, lambda r: r.update(verdict="PASS"))(bundle)
    code, said = run("diff", pristine, bundle)
    assert code == 1
    assert FAILS in said
    code, said = run("diff", bundle, pristine, "--json")
    (change,) = json.loads(said)["verdicts"]
    assert (code, change["a"], change["b"]) == (1, "PASS", "FAIL")


def test_report_makes_derived_files_anew_and_hides_nothing(run: Run, bundle: Path) -> None:
    (bundle / "report.html").write_text("gone")
    (bundle / "report.md").unlink()
    code, said = run("report", bundle, "--json")
    assert (code, len(json.loads(said)["written"])) == (0, 3)
    assert run("verify", bundle)[0] == 0
    result(PASSES, lambda r: r.update(seconds=0.0))(bundle)
    assert run("report", bundle)[0] == 0
    code, said = run("verify", bundle)
    assert (code, "EDITED  results.jsonl" in said) == (4, True)
