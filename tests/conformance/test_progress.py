"""How far a run is, for someone who does not watch a terminal."""

from __future__ import annotations

import pytest

from glm5_hal.conformance import report


def test_without_a_terminal_there_is_a_plain_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("glm5_hal.conformance.report.time.monotonic", lambda: now[0])
    with report.shown(total=9, done=4) as note:
        note("a[x]", 0)
        now[0] += report.EVERY
        note("a[y]", 1)
        note("a[z]", 1)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "6 of 9 judged, 1 failed; last a[y]\n")
