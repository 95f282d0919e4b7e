"""The contract job: its own parts anywhere, and the job itself where the vendor's torch_npu is at hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .emulation import ROOT

CONTRACT = ROOT / "ci/ascend/contract.py"


def job(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CONTRACT), *args], capture_output=True, text=True)


def test_a_folder_without_torch_npu_is_wrong_usage(tmp_path: Path) -> None:
    done = job("--site", str(tmp_path), "--stubs", str(tmp_path))
    assert done.returncode == 2
    assert "holds no torch_npu" in done.stderr


def test_a_torch_npu_that_cannot_be_imported_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    (tmp_path / "libascendcl.so").touch()
    done = job("--site", str(tmp_path), "--stubs", str(tmp_path))
    assert done.returncode == 3
    assert "libhccl.so" in done.stderr


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="needs gcc and nm")
def test_stand_ins_define_what_a_library_calls(tmp_path: Path) -> None:
    """A library that calls CANN can be loaded over them, and is told that nothing works."""
    site, out = tmp_path / "site", tmp_path / "stubs"
    (site / "torch_npu").mkdir(parents=True)
    source = tmp_path / "calls.c"
    source.write_text(
        "int aclrtGetDeviceCount(unsigned *); int aclrtMalloc(void **, long, int);\n"
        "int devices(void) { unsigned n = 0; aclrtGetDeviceCount(&n); return n; }\n"
        "int allocated(void) { return aclrtMalloc(0, 1, 0); }\n"
    )
    library = site / "torch_npu/calls.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    subprocess.run(
        [sys.executable, str(ROOT / "ci/ascend/stubs.py"), "--site", str(site), "--out", str(out)], check=True
    )
    code = (
        f"import ctypes; ctypes.CDLL('{out}/libhccl.so', ctypes.RTLD_GLOBAL); calls = ctypes.CDLL('{library}'); "
        "print(calls.devices(), calls.allocated())"
    )
    env = {**os.environ, "LD_LIBRARY_PATH": str(out)}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    assert said.split() == ["1", "507899"]


@pytest.mark.slow
def test_every_call_fits_the_vendors_schemas() -> None:
    done = job("--json")
    if done.returncode == 3:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert done.returncode == 0, [call for call in report["calls"] if call["outcome"] == "failed"]
    assert report["schemas"] == report["on_cpu"] == []
    assert all(counts.get("ok") for counts in report["summary"].values()), report["summary"]
