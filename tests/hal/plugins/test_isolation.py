"""What a plugin prints is kept for its record, and spoils nobody else's output."""

import sys
import threading
import time
from pathlib import Path

import pytest

from glm5_hal.plugins import PluginRecord

from .site import GOOD, Site, wait_for

NOISE = """
import sys
print("hello from", NAME)
print("and a warning", file=sys.stderr)
sys.stdout.buffer.write(b"raw bytes\\n")
assert not sys.stdout.isatty()
sys.stderr.fileno()
"""


def test_what_a_plugin_prints_is_kept_in_its_record(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    site.install("acme", NOISE + GOOD)
    record = site.record("acme")
    assert record.status == "ok"
    assert record.output == "hello from acme\nand a warning\nraw bytes\n"
    assert capfd.readouterr() == ("", "")
    assert (sys.stdout, sys.stderr) == before


def test_what_a_broken_plugin_printed_is_kept_too_up_to_a_limit(site: Site) -> None:
    site.install("acme", "print('x' * 1_000_000)\nraise ValueError")
    record = site.record("acme")
    assert record.code == "IMPORT"
    assert 1000 < len(record.output) <= 65536


def test_a_plugin_that_wraps_stdout_does_not_take_it_away(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    wrap = "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'utf-8')\nprint('mine')\n"
    site.install("acme", wrap + GOOD)
    record = site.record("acme")
    print("ours")  # noqa: T201 - it must still come out
    assert (record.status, capsys.readouterr().out) == ("ok", "ours\n")


def test_what_other_threads_print_meanwhile_is_theirs(
    site: Site, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("acme", "print('from the plugin')" + wait_for(gate) + GOOD)
    found: list[PluginRecord] = []
    loading = threading.Thread(target=lambda: found.append(site.record("acme")))
    loading.start()
    while "acme_plugin" not in sys.modules:
        time.sleep(0.01)
    print("from the program")  # noqa: T201 - it is what is tested
    gate.touch()
    loading.join()
    assert capsys.readouterr().out == "from the program\n"
    assert found[0].output == "from the plugin\n"


def test_a_plugin_that_was_given_up_cannot_spoil_stdout_later(
    site: Site, gate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = tmp_path / "said"
    site.install("acme", wait_for(gate) + f"print('too late')\nopen({str(said)!r}, 'w').close()")
    assert site.record("acme", deadline=0.2).code == "TIMEOUT"
    gate.touch()
    while not said.exists():
        time.sleep(0.01)
    print("ours")  # noqa: T201 - it is what is tested
    assert capsys.readouterr().out == "ours\n"


def test_of_endless_output_the_end_is_kept(site: Site) -> None:
    site.install("acme", "for n in range(200_000): print(n)\nraise ValueError")
    record = site.record("acme")
    assert len(record.output) <= 65536
    assert record.output.endswith("199998\n199999\n")


def test_a_module_that_spoils_its_own_name_is_told_all_the_same(site: Site) -> None:
    site.install("acme", "__name__ = 5\nraise ValueError('mine')")
    record = site.record("acme")
    assert (record.code, record.reason) == ("IMPORT", "importing acme_plugin raised ValueError: mine")
