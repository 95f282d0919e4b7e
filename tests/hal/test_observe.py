"""What ran, and how often: said where it is asked for, and costing nothing where it is not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import CROWD, PAIR, PIPE, installed, kernel_of, published, raised, stand_in, toy

import glm5_hal
from glm5_hal import context, observe
from glm5_hal.capability import limit

pair, pipe = toy(PAIR), toy(PIPE)
ones = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def acme(fresh: pytest.MonkeyPatch) -> Iterator[None]:
    observe._announced.clear()
    small = kernel_of(PAIR, requires=[limit("k", 2)])
    with published(), installed(stand_in("acme", [small]), stand_in("other", [kernel_of(PAIR), kernel_of(CROWD)])):
        yield


def settings(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """GLM5_LOG, read anew; the stand-ins stay."""
    monkeypatch.setenv("GLM5_LOG", text)
    context._process.settings = None


# Counters


def test_nothing_is_counted_unless_it_is_switched_on() -> None:
    pair(ones)
    assert glm5_hal.counts() == {}


def test_calls_and_seconds_are_counted_per_op_and_kernel() -> None:
    pair(ones)  # an entry that was made before must not stay unobserved
    glm5_hal.watch(counters=True)
    for _ in range(3):
        pair(ones)
    pair(ones, k=3)
    pipe(ones)
    found = glm5_hal.counts()
    assert {name: row["calls"] for name, row in found.items()} == {
        "toy_pair[acme:native]": 5,
        "toy_pair[other:native]": 1,
        "toy_pipe[acme:composite]": 1,
    }
    assert next(iter(found)) == "toy_pair[acme:native]", "most calls first"
    assert all(row["seconds"] > 0 for row in found.values())
    assert not any(row["fallback"] for row in found.values())
    assert found["toy_pipe[acme:composite]"]["seconds"] >= 2 * found["toy_pair[acme:native]"]["seconds"] / 5 / 100
    glm5_hal.clear_counts()
    assert glm5_hal.counts() == {}


def test_a_call_that_raises_is_counted() -> None:
    def fail(x: Any, y: Any = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Any:
        raise ValueError("no")

    with installed(stand_in("acme", [kernel_of(PAIR, fn=fail)])):
        glm5_hal.watch(counters=True)
        assert raised(pair, ones).code == "KERNEL"
    assert glm5_hal.counts()["toy_pair[acme:native]"]["calls"] == 1


def test_switched_off_the_bare_kernel_is_called_again() -> None:
    crowd = toy(CROWD)
    args = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, dtype=torch.int32)]

    def stored() -> set[Any]:
        pair(ones), crowd(*args), crowd(*args)
        return {*pair._table.values(), *(entry[2] for entry in crowd._table.values()), crowd._last[0][2]}

    bare = {PAIR.reference, CROWD.reference}
    assert stored() == bare
    for switches in ({"counters": True}, {"profile": True}, {"counters": True, "profile": True}):
        glm5_hal.watch(**switches)
        assert not stored() & bare
        glm5_hal.watch()
        assert stored() == bare


# Profiler ranges


def test_a_profiler_sees_each_call_under_its_name() -> None:
    def seen() -> dict[str, int]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            pair(ones), pair(ones), pair(ones, k=3)
        return {e.key: e.count for e in profile.key_averages() if e.key.startswith("glm5::")}

    assert seen() == {}
    glm5_hal.watch(profile=True)
    assert seen() == {"glm5::toy_pair[acme:native]": 2, "glm5::toy_pair[other:native]": 1}
    glm5_hal.watch()
    assert seen() == {}


# Fallbacks


def test_a_listed_fallback_warns_once_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="glm5_hal"):
        for k in (1, 3, 3, 4):
            with glm5_hal.use("acme,other"):
                pair(ones, k=k)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("glm5_hal", "WARNING")
    assert record.getMessage() == (
        "fallback: toy_pair is served by other:native, which is not the first backend in the policy"
    )
    assert glm5_hal.counts()["toy_pair[other:native]"] == {"calls": 0, "seconds": 0, "fallback": True}


def test_what_auto_takes_is_no_fallback_but_an_auto_after_a_name_is(caplog: pytest.LogCaptureFixture) -> None:
    pair(ones, k=3)
    assert caplog.records == []
    with glm5_hal.use("acme,auto"):
        pair(ones, k=3)
    assert [r.name for r in caplog.records] == ["glm5_hal"]


# GLM5_LOG


def test_nothing_is_logged_without_a_setting(capfd: pytest.CaptureFixture[str]) -> None:
    pair(ones)
    assert capfd.readouterr() == ("", "")


def test_info_is_one_line_per_op_and_kernel(fresh: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    settings(fresh, "info")
    for k in (1, 1, 2, 3, 4):
        pair(ones, k=k)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "glm5_hal hal.select  op=toy_pair  kernel=acme:native  signature=x:float32[2, 3] k=1 mode=plain flag=False",
        "glm5_hal hal.select  op=toy_pair  kernel=other:native  signature=x:float32[2, 3] k=3 mode=plain flag=False",
    ]


def test_debug_is_one_line_per_signature(fresh: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    settings(fresh, "debug")
    for k in (1, 1, 2, 3, 4):
        pair(ones, k=k)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split("k=")[1][0] for line in (text.split("signature=")[1] for text in lines)] == ["1", "2", "3", "4"]


def test_jsonl_is_one_object_per_selection_and_fallback(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"event": "earlier"}\n')
    settings(fresh, f"jsonl:{file}")
    with glm5_hal.use("acme,other"):
        pair(ones), pair(ones), pair(ones, ones, k=3)
    earlier, *events = [json.loads(line) for line in file.read_text().splitlines()]
    assert earlier == {"event": "earlier"}, "the file is added to"
    assert [(e["event"], e["op"], e["kernel"]) for e in events] == [
        ("hal.select", "toy_pair", "acme:native"),
        ("hal.fallback", "toy_pair", "other:native"),
        ("hal.select", "toy_pair", "other:native"),
    ]
    assert events[2]["signature"] == "x:float32[2, 3] y:float32[2, 3] k=3 mode=plain flag=False"
    assert events[0]["time"] <= events[1]["time"] <= events[2]["time"]


def test_a_process_that_is_told_by_its_environment(tmp_path: Path) -> None:
    code = (
        "import torch, glm5_hal\n"
        "glm5_hal.ops.rms_norm(torch.ones(2, 4), torch.ones(4), eps=1e-5)\n"
        "glm5_hal.ops.topk_indices(torch.ones(2, 4), torch.tensor([4, 4], dtype=torch.int32), top_k=2)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM5_")}
    env |= {"GLM5_LOG": "jsonl:events.jsonl", "GLM5_BACKEND": "cpu:reference; topk_indices=cpu:torch"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["op"], e["kernel"]) for e in events] == [("rms_norm", "cpu:reference"), ("topk_indices", "cpu:torch")]


def test_a_log_that_cannot_be_written_breaks_no_call_and_is_said_once(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "events.jsonl"
    settings(fresh, f"jsonl:{file}")
    context.settings()
    file.mkdir()  # after the setting was read
    for k in (1, 2, 3):
        assert float(pair(ones, k=k)[0, 0]) == 1 + k
    (said,) = caplog.records
    assert str(file) in said.getMessage()
