"""A probe in a child process: what a thread could not survive."""

import os
import sys
import time
from pathlib import Path

import pytest

from glm5_hal.backend import Device, Unavailable
from glm5_hal.plugins import probe_in_subprocess

from .site import GOOD, Site, line_of, probing


def in_a_child(site: Site, body: str, deadline: float = 20.0) -> Device | Unavailable:
    site.install("acme", probing(body))
    return probe_in_subprocess(site.record("acme"), deadline)


def broken_in_a_child(site: Site, body: str, deadline: float = 20.0) -> str:
    found = in_a_child(site, body, deadline)
    assert isinstance(found, Unavailable)
    assert found.fault
    assert "see whether the driver answers; pip install -U 'acme-hal'" in found.fix
    return found.reason


def test_a_crash_costs_the_child_alone_and_says_which_signal_and_where(site: Site) -> None:
    reason = broken_in_a_child(site, "import ctypes\nctypes.string_at(0)")
    assert reason == f"the probe died with SIGSEGV, at {line_of(site.folder / 'acme_plugin.py', 'string_at(0)')}"


def test_an_abort_without_a_python_frame_brings_its_last_words(site: Site) -> None:
    body = (
        "import os, signal\nos.write(2, b'terminate called after acme::error\\n')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    reason = broken_in_a_child(site, body)
    assert reason == "the probe died with SIGKILL; its last words: terminate called after acme::error"


@pytest.mark.parametrize("status", [0, 3])
def test_a_probe_that_ends_the_process(site: Site, status: int) -> None:
    reason = broken_in_a_child(site, f"import os\nos._exit({status})")
    assert reason == f"the probe ended its process with status {status} and without an answer"


def test_a_hang_costs_the_deadline_and_leaves_no_process_behind(site: Site, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    body = f"""
    import os, subprocess, time
    helper = subprocess.Popen(["sleep", "600"])
    open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{helper.pid}}")
    time.sleep(600)
    """
    start = time.monotonic()
    reason = broken_in_a_child(site, body, deadline=3.0)
    assert 3.0 <= time.monotonic() - start < 8
    assert reason == f"the probe did not answer within 3 s, at {line_of(site.folder / 'acme_plugin.py', 'time.sleep')}"
    for pid in pids.read_text().split():
        assert gone(int(pid))


def gone(pid: int) -> bool:
    """No such process, or only its entry in the table: who adopts orphans may be slow to bury them."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


def test_a_hang_that_never_lets_python_run_is_ended_too(site: Site) -> None:
    body = "import ctypes\nctypes.PyDLL(None).sleep(600)"
    assert "did not answer within 2.5 s, at " in broken_in_a_child(site, body, deadline=2.5)


@pytest.mark.parametrize(
    "body",
    [
        "print('{}'); print('x' * 10_000_000)",
        "import os; [os.write(1, b'x' * 100_000 + b'\\n') for _ in range(100)]",
        "import os; [os.write(2, b'x' * 100_000) for _ in range(100)]",
        "import subprocess; subprocess.Popen(['sleep', '600'])",
        "import os, time; os.fork() or time.sleep(600)",
    ],
    ids=["print", "stdout", "stderr", "helper", "fork"],
)
def test_neither_noise_nor_a_process_left_behind_hides_the_answer(site: Site, body: str) -> None:
    start = time.monotonic()
    assert isinstance(in_a_child(site, f"{body}\nreturn Device('cpu', 'A', 'a1')"), Device)
    assert time.monotonic() - start < 10


def test_the_child_loads_the_one_plugin_and_no_other(site: Site, tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    site.install("acme")
    site.install("zeta", f"with open({str(loaded)!r}, 'a') as f: f.write('x')" + GOOD)
    assert isinstance(probe_in_subprocess(site.record("acme")), Device)
    assert loaded.read_text() == "x", "by discovery in this process, not by the child"


def test_a_plugin_that_the_child_cannot_load(site: Site) -> None:
    file = site.install("acme")
    record = site.record("acme")
    file.write_text("raise ValueError('changed')")
    found = probe_in_subprocess(record)
    assert isinstance(found, Unavailable)
    assert "could not load the plugin: importing acme_plugin raised ValueError: changed" in found.reason
    assert found.fault


def test_an_interpreter_that_cannot_be_started(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme")
    record = site.record("acme")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    found = probe_in_subprocess(record)
    assert isinstance(found, Unavailable)
    assert "could not be started: FileNotFoundError" in found.reason
    assert found.fault
