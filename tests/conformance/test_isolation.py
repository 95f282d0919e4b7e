"""Real kernels in real workers: a plugin that crashes, hangs, starves and overruns is judged to the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import pytest
from bundles import read

from glm5_hal.conformance.bundle import files
from glm5_hal.conformance.bundle.rerun import rerun

#: In this order, so that few workers are used up.
CASES = {
    "moe_permute[float32-tokens]": ("PASS", ""),
    "topk_indices[float32-rows]": ("PASS", ""),
    "topk_indices[error-top_k_zero]": ("PASS", ""),
    "add_rms_norm[float32-tokens]": ("FAIL", "RAISED"),
    "silu_and_mul[float32-tokens]": ("FAIL", "integrity"),
    "rms_norm[float32-tokens]": ("CRASH", "SIGSEGV"),
    "rope[float32-heads-half]": ("HANG", "TIMEOUT"),
    "hadamard[float32-rows]": ("OOM", ""),
    "moe_combine[float32-tokens]": ("CRASH", "STDOUT"),
    "moe_route[float32-biased]": ("FAIL", "KERNEL"),
    "topk_indices[float32-one]": ("PASS", ""),
    "grouped_gemm[float32-ragged]": ("UNSUPPORTED", "NOT_IMPLEMENTED"),
}


def hal(*words: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glm5_hal", "conformance", "run", *words]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GLM5_")}
    return subprocess.run(command, env=inherited | env, capture_output=True, text=True, timeout=timeout)


def by_case(out: Path) -> dict[str, dict[str, Any]]:
    return {record["case"]: record for record in read(out / "results.jsonl")}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plugin as a vendor has it: a file of its own, on no path."""
    file = tmp_path_factory.mktemp("vendor") / "hostile.py"
    file.write_text(Path(hostile.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def whole(plugin: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One run over everything."""
    out = tmp_path_factory.mktemp("out")
    chosen = [word for case in CASES for word in ("--case", case)]
    return hal("--plugin", plugin, *chosen, "--timeout", "5", "--memory", "3", "--out", str(out), "--json"), out


def test_every_case_is_judged_and_every_verdict_is_right(whole: Any) -> None:
    done, out = whole
    found = by_case(out)
    assert list(found) == list(CASES), done.stderr
    assert {case: (r["verdict"], r["code"]) for case, r in found.items()} == CASES
    assert {r["evidence"] for r in found.values()} == {"simulated"}
    assert {r["backend"] for r in found.values()} == {"hostile:native"}
    assert not (out / "results.partial.jsonl").exists()
    assert (out / "junit.xml").exists()


def test_a_run_with_crashes_is_exit_code_1_and_its_stdout_is_its_report_alone(whole: Any) -> None:
    done, _ = whole
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert (said["ok"], said["cases"]) == (False, len(CASES))
    assert said["verdicts"]["CRASH"] == 2


def test_a_crash_says_which_signal_where_and_what_was_printed_before(plugin: str, whole: Any) -> None:
    crash = by_case(whole[1])["rms_norm[float32-tokens]"]
    line = _line(plugin, "ctypes.string_at(0)")
    assert crash["detail"] == f"the process ended with SIGSEGV, at {plugin}:{line}"
    assert crash["log"].startswith("reading address 0\nFatal Python error: Segmentation fault")
    assert "conformance/runner.py" not in crash["log"]
    assert crash["repro"] == (
        f"glm5-hal conformance run --plugin {plugin} --backend hostile:native "
        "--case 'rms_norm[float32-tokens]' --seed 0"
    )


def test_a_hang_says_where(plugin: str, whole: Any) -> None:
    hang = by_case(whole[1])["rope[float32-heads-half]"]
    assert hang["detail"] == f"did not end within 5 s, at {plugin}:{_line(plugin, 'ctypes.PyDLL')}"


def test_an_overrun_says_whose_neighbour_was_hit(whole: Any) -> None:
    overrun = by_case(whole[1])["silu_and_mul[float32-tokens]"]
    assert overrun["detail"] == "integrity: wrote 100 bytes beside x, in the memory around it"


def test_what_needed_a_fresh_worker_was_not_blamed_on_its_neighbours(whole: Any) -> None:
    assert not [r["case"] for r in by_case(whole[1]).values() if r["remark"]]


def test_a_recorded_crash_is_computed_again_and_ends_nothing_else(plugin: str, whole: Any) -> None:
    bundle = files.read(whole[1])
    some = [r for r in bundle.results if r.code == "SIGSEGV" or r.case.startswith("topk_indices")]
    done = rerun(replace(bundle, results=tuple(some)), 9, seed=0, plugin=plugin)
    assert (len(done.cases), done.problems) == (4, ())


def _line(file: str, text: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_a_plugin_that_kills_whoever_imports_it_is_a_device_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "fatal.py").write_text("import os\nos.abort()\n", encoding="utf-8")
    done = hal("--plugin", str(tmp_path / "fatal.py"), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "cannot be started: the process ended with SIGABRT" in done.stderr
    assert str(tmp_path / "fatal.py") in done.stderr


def test_in_this_process_a_crash_is_the_debuggers_and_what_was_judged_is_kept(plugin: str, tmp_path: Path) -> None:
    cases = ("--case", "topk_indices[float32-one]", "--case", "rms_norm[float32-tokens]")
    done = hal("--plugin", plugin, *cases, "--in-process", "--out", str(tmp_path))
    assert done.returncode == -signal.SIGSEGV
    assert [r["verdict"] for r in read(tmp_path / "results.partial.jsonl")] == ["PASS"]
