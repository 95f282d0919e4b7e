"""glm5-hal report: the ops of a live run, the most suspicious first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glm5_hal.cli import app
from glm5_hal.errors import HalError
from glm5_hal.shadow import report


def record(op: str, excess: float | str = 0.3, ok: bool = True, **more: Any) -> dict[str, Any]:
    base = {"op": op, "kernel": "acme:native", "ok": ok, "proves": True, "excess": excess, "criterion": "y.row"}
    return {**base, "detail": "" if ok else "y: row: 3 > 1", "signature": f"x:float32[{op}]", **more}


def test_wrong_ops_come_first_then_the_worst() -> None:
    rows = report.ranked(
        [record("rope", 0.2), record("rope", 0.9), record("topk_indices", 1.0, ok=False), record("hadamard", 0.5)]
    )
    assert [row["op"] for row in rows] == ["topk_indices", "rope", "hadamard"]
    assert (rows[1]["worst"], rows[1]["median"], rows[1]["judged"]) == (0.9, 0.55, 2)
    assert [rows[0][k] for k in ("failed", "detail", "signature")] == [1, "y: row: 3 > 1", "x:float32[topk_indices]"]


def test_what_proves_nothing_and_what_was_skipped_is_counted_apart() -> None:
    skipped = {"op": "rope", "kernel": "acme:native", "skipped": "too large"}
    (row,) = report.ranked([record("rope", proves=False, ok=False), skipped, skipped, record("rope", "inf")])
    assert (row["judged"], row["failed"], row["skipped"], row["why_skipped"]) == (1, 0, 2, "too large")
    assert (row["proves_nothing"], row["worst"]) == (1, "inf")


def test_the_command_prints_a_table_or_json_and_its_exit_code_says_whether_a_call_was_wrong(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(json.dumps(record("rope")) + "\n")
    assert CliRunner().invoke(app, ["report", str(file)]).exit_code == 0
    file.write_text(json.dumps(record("rope", "inf", ok=False)) + "\n")
    shown = CliRunner().invoke(app, ["report", str(file)])
    assert shown.exit_code == 1
    assert "row: 3 > 1" in " ".join(shown.output.split())
    found = CliRunner().invoke(app, ["report", str(file), "--json"])
    assert (found.exit_code, json.loads(found.output)["ops"][0]["failed"]) == (1, 1)


@pytest.mark.parametrize("text", ["{", "[]", '{"kernel": "a"}'])
def test_a_file_that_is_none_is_an_error_with_its_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text(text + "\n")
    with pytest.raises(HalError, match="line 1 is no record"):
        report.read(file)
    with pytest.raises(HalError, match="no shadow file"):
        report.read(tmp_path / "none")
