"""The first import of torch, where some other package prevents it: in a process of its own, since it is but once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLI = ("-m", "glm5_hal")
CALL = """
import glm5_hal
for _ in range(2):
    try:
        glm5_hal.ops.rms_norm
    except glm5_hal.HalError as problem:
        print("error", problem)
"""


def run(site: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "300", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def install(site: Path, entry_points: bytes) -> Path:
    info = site / "odd_hal-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-hal\nVersion: 1.0\n")
    (info / "entry_points.txt").write_bytes(entry_points)
    return info


@pytest.mark.parametrize(
    ("entry_points", "reason", "fix"),
    [
        (b"[console_scripts]\nodd\n", "odd-hal 1.0: entry_points.txt cannot be read", "pip uninstall odd-hal"),
        (b"[torch.backends]\nodd = odd_gone:load\n", "backend extension: odd", "(odd-hal)"),
    ],
)
def test_the_package_that_prevents_it_is_named_each_time(
    tmp_path: Path, entry_points: bytes, reason: str, fix: str
) -> None:
    install(tmp_path, entry_points)
    said = [run(tmp_path, "-c", CALL).stdout]
    assert said[0].count("error [UNAVAILABLE]") == said[0].count(reason) == 2
    for words in (("list",), ("explain", "rms_norm"), ("conformance", "list")):
        done = run(tmp_path, *CLI, *words)
        assert (done.returncode, done.stdout) == (3, "")
        said.append(done.stderr)
    for text in said:
        assert "Traceback" not in text
        assert reason in text
        assert fix in text
        assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in text


def test_the_doctor_blames_the_package_and_not_the_cpu(tmp_path: Path) -> None:
    install(tmp_path, b"[console_scripts]\nodd\n")
    done = run(tmp_path, *CLI, "doctor")
    assert done.returncode == 1
    assert "cpu: pip install -U 'odd-hal', or take it out" in done.stdout
    assert "reinstall glm5-hal" not in done.stdout


def test_without_torchs_autoload_all_works_and_the_package_is_listed(tmp_path: Path) -> None:
    install(tmp_path, b"[console_scripts]\nodd\n")
    done = run(tmp_path, *CLI, "list", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr
    assert "odd-hal" in done.stdout


def test_a_pipe_that_torch_would_wait_for(tmp_path: Path) -> None:
    file = install(tmp_path, b"") / "entry_points.txt"
    file.unlink()
    os.mkfifo(file)
    done = run(tmp_path, *CLI, "list")
    assert done.returncode == 3
    assert "is not a regular file" in done.stderr
