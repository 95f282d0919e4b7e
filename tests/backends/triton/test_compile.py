"""`ci/triton_compile.py`: what it reports of kernels that are compiled without a GPU, and what breaks its gates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
BUDGETS = ROOT / "ci/triton_budgets.toml"
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"}

Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Compiles rms_norm in bfloat16, each kernel once."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "TRITON_INTERPRET": "1"}
    subset = ("--op", "rms_norm", "--dtype", "bfloat16", "--jobs", "1", "--json")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "ci/triton_compile.py"), *subset, *args]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    import triton_budgets

    return triton_budgets


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    import triton_outcomes

    return triton_outcomes


def test_every_target_is_compiled_for_whatever_the_environment_says(job: Job) -> None:
    done = job()
    report = json.loads(done.stdout)
    assert (done.returncode, report["problems"], report["evidence"]) == (0, [], "compiled")
    assert {kernel["target"] for kernel in report["kernels"]} == TARGETS
    for kernel in report["kernels"]:
        assert (kernel["op"], kernel["dtype"], kernel["kernel"]) == ("rms_norm", "bfloat16", "_rms_norm")
        assert kernel["call"].startswith("rms_norm[bfloat16-glm5-")
        assert kernel["registers"] > 0
        assert (kernel["spilled"], kernel["problem"]) == (0, "")


def test_a_kernel_that_does_not_fit_breaks_a_gate(job: Job, tmp_path: Path) -> None:
    small = tmp_path / "budgets.toml"
    small.write_text(BUDGETS.read_text().replace("shared = 65_536", "shared = 4"))
    done = job("--target", "gfx942", "--budgets", str(small))
    problems = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert problems
    assert all("bytes of shared memory, there are 4" in problem for problem in problems)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["triton_compile.py", "triton_ascend.py"])
def test_every_kernel_holds_its_budgets(job: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "ci" / job), "--json"], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert {kernel["op"] for kernel in report["kernels"]} > {"mla_decode", "sparse_mla", "moe_experts"}
    assert done.returncode == 0


@pytest.mark.parametrize("args", [("--op", "no_such_op"), ("--target", "gfx1"), ("--budgets", "no/such.toml")])
def test_what_is_not_there_is_a_usage_error(args: tuple[str, str]) -> None:
    command = [sys.executable, str(ROOT / "ci/triton_compile.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def compiler(folder: Path, crashes: int, *, code: int = 0) -> Callable[[], str]:
    """One in a process of its own, that is killed when it first runs."""
    tried = folder / "tried"
    script = f"""
import os, signal, sys
with open({str(tried)!r}, "a+") as tried:
    tried.write("x")
    if tried.tell() <= {crashes}:
        os.kill(os.getpid(), signal.SIGSEGV)
print("linalg", end="")
sys.exit({code})
"""

    def run() -> str:
        return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout

    return run


def test_a_compiler_that_crashes_is_run_again_and_its_crashes_are_counted(outcomes: Any, tmp_path: Path) -> None:
    assert outcomes.outliving(compiler(tmp_path, 0)) == ("linalg", 0)
    (tmp_path / "tried").unlink()
    assert outcomes.outliving(compiler(tmp_path, 2)) == ("linalg", 2)


def test_one_that_always_crashes_fails_and_says_how(outcomes: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="crashed 4 times of 4, at last by SIGSEGV"):
        outcomes.outliving(compiler(tmp_path, 99))


def test_an_error_of_the_compiler_is_not_tried_again(outcomes: Any, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        outcomes.outliving(compiler(tmp_path, 0, code=1))
    assert (tmp_path / "tried").read_text() == "x"


def kernel(**changed: Any) -> dict[str, Any]:
    whose = {"target": "chip", "op": "rope", "provider": "triton", "dtype": "float32", "kernel": "_rope", "call": "c"}
    return {**whose, "registers": 32, "spilled": 0, "shared": 64, "problem": "", **changed}


CHIP = '[targets.chip]\nbackend = "cuda"\narch = 1\nwarp_size = 32\nshared = 64\n'
EXCUSE = 'op = "*"\nkernel = "_rope"\ndtype = "float32"\ntarget = "chip"\n'


def broken(budgets: Any, folder: Path, text: str, *kernels: dict[str, Any]) -> list[str]:
    (folder / "budgets.toml").write_text(CHIP + text)
    return list(budgets.broken(budgets.read(folder / "budgets.toml"), kernels, whole=True))


def test_spills_and_failures_need_an_excuse(budgets: Any, tmp_path: Path) -> None:
    assert broken(budgets, tmp_path, "", kernel()) == []
    (spilled,) = broken(budgets, tmp_path, "", kernel(spilled=12), kernel(spilled=11))
    assert spilled == "chip rope triton _rope float32: 12 registers of a thread are spilled, 0 may be"
    (failed,) = broken(budgets, tmp_path, "", kernel(problem="Error: no"), kernel(problem="Error: no", call="d"))
    assert failed == "rope triton _rope: Error: no (2 forms, of chip; the first is c)"
    excused = f'[[spills]]\n{EXCUSE}at_most = 12\nreason = "seldom"\n[[failures]]\n{EXCUSE}reason = "its compiler"\n'
    assert broken(budgets, tmp_path, excused, kernel(spilled=12), kernel(problem="Error: no")) == []
    (more,) = broken(budgets, tmp_path, excused, kernel(spilled=13), kernel(problem="Error: no"))
    assert "13 registers" in more


def test_an_excuse_that_nothing_needs_breaks_a_gate(budgets: Any, tmp_path: Path) -> None:
    text = f'[[spills]]\n{EXCUSE}at_most = 12\nreason = "seldom"\n'
    assert broken(budgets, tmp_path, text, kernel()) == ["chip: * _rope float32: no longer spills: remove its excuse"]


@pytest.mark.parametrize("text", ["[[spills]]\n" + EXCUSE + 'reason = " "', "[[spills]]\nop = 1", "[limits]\na = 1"])
def test_what_is_no_budget_is_refused(budgets: Any, tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"budgets\.toml"):
        broken(budgets, tmp_path, text)


def test_a_compiler_that_dies_is_told_and_costs_no_other_kernel(budgets: Any) -> None:
    import dying
    import triton_workers

    units = [triton_workers.Unit(op, "float32", ()) for op in ("one", "dies", "two")]
    whole = triton_workers.Found()
    for found in triton_workers.gather(dying.work, units, 1):
        whole.add(found)
    assert {op for _, op, _ in whole.taken} == {"one", "two"}
    assert [failure.split(":")[0] for failure in whole.failures] == ["dies float32"]
