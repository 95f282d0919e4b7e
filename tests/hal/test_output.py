"""The command's own stdout, whatever an outside plugin does to it; and its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm5_hal.hookspecs import GROUP
from glm5_hal.plugins import PluginRecord
from glm5_hal.plugins.record import printable

HOOK = """
from glm5_hal import Backend, Device, hookimpl
@hookimpl
def glm5_backend():
    return Backend("acme", "cpu", lambda: Device("cpu", "One", "a1"), lambda: ())
"""


def run(site: Path, source: str, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    info = site / "acme_hal-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-hal\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nacme = acme_plugin\n")
    (site / "acme_plugin.py").write_text(source + HOOK)
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "glm5_hal", *words],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environment},
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "noise", ["import os\nos.write(1, b'banner')", "import subprocess\nsubprocess.run(['echo', 'banner'])"]
)
def test_what_a_plugin_writes_to_the_descriptor_spoils_no_json(tmp_path: Path, noise: str) -> None:
    done = run(tmp_path, noise, "explain", "rms_norm", "--backend", "acme,cpu", "--json")
    assert json.loads(done.stdout)["chosen"] == "cpu:torch"
    assert b"banner" in done.stderr


@pytest.mark.parametrize(
    "rest",
    [
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
        "import atexit, time\natexit.register(time.sleep, 600)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\nraise ValueError",
    ],
)
def test_what_a_plugin_leaves_behind_does_not_hold_the_command(tmp_path: Path, rest: str) -> None:
    done = run(tmp_path, rest, "explain", "rms_norm", "--backend", "acme,cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["chosen"] == "cpu:torch"


def test_a_reason_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    odd = "raise ImportError('\\x1b[2J/opt/\\udcff\\u9a71.so \\x1b]0;t\\x07')"
    done = run(tmp_path, odd, "list", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"/opt/\\udcff\\u9a71.so" in done.stdout
    assert b"\x1b" not in done.stdout


def test_a_record_holds_no_control_sequence() -> None:
    record = PluginRecord("a\x1b[1mb", "v", "d\x07", "1\r", builtin=False, reason="x\x1b]0;t\x07y\x9b2J", fix="a\nb")
    assert (record.name, record.dist, record.version, record.reason, record.fix) == ("ab", "d", "1", "xy2J", "a\nb")
    assert printable("\x1b]0;t\x1b\\z\x1b") == "z"
