"""A probe in a child process: what a thread could not survive."""

import os
import sys
import time
from pathlib import Path

import pytest

from glm5_hal.backend import Device, Unavailable
from glm5_hal.plugins import Checkup, check_up, child, find, probe

from .site import GOOD, Site, line_of, probe_in_a_child, probing


def in_a_child(site: Site, body: str, deadline: float = 20.0) -> Device | Unavailable:
    site.install("acme", probing(body))
    return probe_in_a_child(site.record("acme"), deadline)


def test_what_a_hang_is_looked_into_with_is_known_without_the_plugin(site: Site) -> None:
    site.install("acme", probing("while True: pass", smi=("acme-smi", "-L")))
    (record,) = [r for r in find() if r.name == "acme"]
    found = check_up(record, 3.0)
    assert isinstance(found.found, Unavailable)
    assert "did not answer" in found.found.reason
    assert found.found.fix.startswith("see whether `acme-smi -L` answers")
    assert found.ended == found.found.reason


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
    assert isinstance(probe_in_a_child(site.record("acme")), Device)
    assert loaded.read_text() == "x", "by discovery in this process, not by the child"


def test_a_plugin_that_the_child_cannot_load(site: Site) -> None:
    file = site.install("acme")
    record = site.record("acme")
    file.write_text("raise ValueError('changed')")
    found = probe_in_a_child(record)
    assert isinstance(found, Unavailable)
    assert "importing acme_plugin raised ValueError: changed" in found.reason
    assert found.fault


def test_an_interpreter_that_cannot_be_started(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme")
    record = site.record("acme")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    found = probe_in_a_child(record)
    assert isinstance(found, Unavailable)
    assert "could not be started: FileNotFoundError" in found.reason
    assert found.fault


# The stages before and after the probe


def checked(site: Site, source: str, deadline: float = 20.0) -> Checkup:
    """A checkup of a plugin that this process has not loaded."""
    site.install("acme", source)
    (record,) = [r for r in find() if r.name == "acme"]
    return check_up(record, deadline)


def ending(body: str) -> str:
    return f"import os, sys, ctypes\n{body}\n" + GOOD


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ("os._exit(0)", "CRASH", "ended its process with status 0 and without an answer"),
        ("os._exit(7)", "CRASH", "ended its process with status 7"),
        ("ctypes.string_at(0)", "CRASH", "died with SIGSEGV, at "),
        ("os.kill(os.getpid(), 15)", "CRASH", "died with SIGTERM"),
        ("os.close(1)", "CRASH", "closed stdout or stderr"),
        ("os.closerange(0, 100)", "CRASH", "ended its process with status 1"),
        ("ctypes.PyDLL(None).sleep(600)", "TIMEOUT", "did not answer within 2 s, at "),
        ("sys.exit(0)", "IMPORT", "raised SystemExit"),
        ("raise KeyboardInterrupt", "CRASH", "its last words: KeyboardInterrupt"),
    ],
)
def test_a_plugin_that_ends_or_hangs_what_loads_it(site: Site, body: str, code: str, reason: str) -> None:
    found = checked(site, ending(body), deadline=2.0 if code == "TIMEOUT" else 20.0)
    assert (found.record.status, found.record.code, found.found, found.kernel) == ("broken", code, None, "")
    assert reason in found.record.reason
    assert "pip install -U 'acme-hal'" in found.record.fix
    assert found.ended == ("" if code == "IMPORT" else found.record.reason)


NORM = """
def norm(x, weight, *, eps):
    {body}
def kernels():
    {offer}
"""


@pytest.mark.parametrize(
    ("body", "offer", "kernel", "ended"),
    [
        ("return x * (x * x).mean(-1, keepdim=True).rsqrt() * weight", "", "rms_norm on acme:native: right", False),
        ("return x", "", "failed: acme:native gave [[3.0, 4.0]]", False),
        ("return None", "", "failed: AttributeError: 'NoneType'", False),
        ("raise SystemExit(5)", "", "failed: SystemExit: 5", False),
        ("import os; os._exit(0)", "", "failed: the kernel ended its process with status 0", True),
        ("import ctypes; ctypes.string_at(0)", "", "failed: the kernel died with SIGSEGV, at ", True),
        ("", "raise OSError('no compiler')", "failed: HalError: plugin acme (acme-hal 1.0): kernels() raised", False),
        ("", "import ctypes; ctypes.string_at(0)", "failed: the kernel died with SIGSEGV, at ", True),
        ("", "return ()", "no rms_norm to try", False),
    ],
)
def test_a_tiny_kernel_is_tried_there_too(site: Site, body: str, offer: str, kernel: str, ended: bool) -> None:
    offer = offer or "return [Kernel('rms_norm', 'native', norm)]"
    found = checked(site, NORM.format(body=body or "pass", offer=offer) + GOOD)
    assert found.record.status == "ok"
    assert isinstance(found.found, Device)
    assert found.kernel.startswith(kernel)
    assert bool(found.ended) == ended


def test_a_kernel_that_is_refused_keeps_its_own_fix(site: Site) -> None:
    found = checked(site, NORM.format(body="pass", offer="return [Kernel('rms_nrom', 'native', norm)]") + GOOD)
    assert "is for an op that does not exist  -> did you mean 'rms_norm'?" in found.kernel


def test_a_kernel_that_hangs_is_given_up(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "KERNEL_DEADLINE", 3.0)
    found = checked(site, "\ndef kernels():\n    while True: pass\n" + GOOD)
    assert found.kernel.startswith("failed: the kernel did not answer within 3 s")


def test_of_a_plugin_in_order_all_is_told_but_the_plugin_itself(site: Site) -> None:
    found = checked(site, "print('hello')\n" + GOOD)
    assert (found.record.status, found.record.device_type, found.record.output) == ("ok", "cpu", "hello\n")
    assert found.record.backend is None
    assert found.found == probe(site.record("acme"))
    assert "acme_plugin" in sys.modules, "by the line above, not by the checkup"
