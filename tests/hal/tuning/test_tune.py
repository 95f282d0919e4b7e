"""``glm5-hal tune`` on a made-up device, whose clock says what each choice of block sizes takes."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import installed, raised, stand_in

from glm5_hal import cli, tuning
from glm5_hal.backend import Device, Kernel, Tunable, Unavailable
from glm5_hal.capability import one_of
from glm5_hal.conformance import timing, workloads
from glm5_hal.conformance.workloads import Load, Workload
from glm5_hal.ops import specs
from glm5_hal.tuning import Tuned, tune
from glm5_hal.tuning.sections import parsed

TODAY = datetime.date(2026, 1, 31)
DEVICE = Device("cpu", "Acme One", "acme1", evidence="simulated", versions={"driver": "1.2", "triton": "3.2.0"})
SOURCE = f"Acme One, driver 1.2, triton 3.2.0, {TODAY}"
FILE = """\
# Acme's.
source = "untuned"

[arch.acme0.rope]
num_warps = 3
"""
SIZES = {"rms_norm": {"BLOCK": 16, "num_warps": 4}, "rope": {"num_warps": 4}}


class Calendar(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return TODAY


@pytest.fixture(autouse=True)
def _one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the tests may cross midnight."""
    monkeypatch.setattr(datetime, "date", Calendar)


class Acme:
    """A backend whose kernels have block sizes, and a clock that knows them."""

    def __init__(self, file: Path) -> None:
        self.file, self.sizes = file, {op: dict(sizes) for op, sizes in SIZES.items()}
        self.running: Mapping[str, int] = {}
        self.wrong: set[int] = set()
        self.failing: set[int] = set()
        self.requires: Sequence[Any] = ()
        self.device: Device | Unavailable = DEVICE

    def kernels(self, arch: str, sizes: Mapping[str, Mapping[str, int]]) -> list[Kernel]:
        assert arch == "acme1"
        return [self.kernel(op, {**known, **sizes.get(op, {})}) for op, known in self.sizes.items()]

    def kernel(self, op: str, sizes: Mapping[str, int]) -> Kernel:
        reference = specs()[op].reference

        def fn(*args: Any, **kwargs: Any) -> Any:
            self.running = sizes
            if sizes["num_warps"] in self.failing:
                raise RuntimeError("out of resource: shared memory\nand a long story")
            return reference(*args, **kwargs) + (sizes["num_warps"] in self.wrong)

        fn.__signature__ = specs()[op].signature  # type: ignore[attr-defined]
        return Kernel(op, "acme", fn, tuple(self.requires))

    def candidates(self, op: str, sizes: Mapping[str, int]) -> Mapping[str, Sequence[int]]:
        return {name: [size, 2 * size, 4 * size] for name, size in sizes.items()}

    def clock(self, call: Callable[[], Any], device: str, budget: float) -> float:
        """The more warps the better, and the larger the block the worse."""
        call()
        return self.running.get("BLOCK", 16) / self.running["num_warps"] / 1e6

    @property
    def record(self) -> Any:
        tunable = Tunable(self.file, lambda arch: self.sizes, self.candidates, self.kernels)
        return stand_in("acme", lambda: self.kernels("acme1", {}), probe=lambda: self.device, tuning=tunable)


@pytest.fixture
def acme(tmp_path: Path) -> Iterator[Acme]:
    file = tmp_path / "tuning.toml"
    file.write_text(FILE)
    made = Acme(file)
    with installed(made.record):
        yield made


CALLS = [
    Workload("rms_norm", "T3", lambda device: {"x": torch.ones(3, 8), "weight": torch.ones(8), "eps": 1e-5}),
    Workload("rms_norm", "T9", lambda device: {"x": torch.ones(9, 8), "weight": torch.ones(8), "eps": 1e-5}),
    Workload(
        "rope", "T2",
        lambda device: {"x": torch.ones(2, 4), "cos": torch.ones(2, 2), "sin": torch.ones(2, 2), "layout": "half"},
    ),
]  # fmt: skip


def tuned(acme: Acme, *only: str, **more: Any) -> Tuned:
    return tune("acme", only or ("*",), calls=CALLS, timer=acme.clock, **more)


# --- what is found ---------------------------------------------------------------------------------------------------


def test_the_faster_sizes_are_written_with_where_they_were_measured(acme: Acme) -> None:
    found = tuned(acme)
    assert acme.file.read_text().startswith(FILE)
    assert parsed(acme.file.read_text())["arch"] == {
        "acme0": {"rope": {"num_warps": 3}},
        "acme1": {
            "source": SOURCE,
            "rms_norm": {"BLOCK": 16, "num_warps": 16},
            "rope": {"num_warps": 16},
        },
    }
    norm, rope = found.ops
    assert (norm.before, norm.after) == ({"BLOCK": 16, "num_warps": 4}, {"BLOCK": 16, "num_warps": 16})
    assert (norm.calls, rope.calls) == (["T3", "T9"], ["T2"])
    assert norm.gain == pytest.approx(4.0)
    assert (found.source, found.file, found.wrote) == (SOURCE, str(acme.file), True)


def test_what_computes_something_else_is_passed_over(acme: Acme) -> None:
    acme.wrong = {16}
    (found,) = tuned(acme, "rope").ops
    assert found.after == {"num_warps": 8}
    assert found.passed_over == {"num_warps=16": "it computes something else"}


def test_what_the_device_has_no_room_for_is_passed_over(acme: Acme) -> None:
    acme.failing = {8}
    (found,) = tuned(acme, "rope").ops
    assert found.after == {"num_warps": 16}
    assert found.passed_over == {"num_warps=8": "RuntimeError: out of resource: shared memory"}


def test_where_nothing_is_faster_the_sizes_in_force_are_measured_ones_now(acme: Acme) -> None:
    acme.clock = lambda call, device, budget: 1e-5  # type: ignore[method-assign]
    (found,) = tuned(acme, "rope").ops
    assert (found.after, found.gain) == ({"num_warps": 4}, 1.0)
    assert parsed(acme.file.read_text())["arch"]["acme1"]["rope"] == {"num_warps": 4}


def test_sizes_of_one_op_leave_those_of_the_others_and_say_what_is_new(acme: Acme) -> None:
    section = '\n[arch.acme1]\nsource = "long ago"\n\n[arch.acme1.rms_norm]\nBLOCK = 32\n'
    acme.file.write_text(FILE + section)
    tuned(acme, "rope")
    assert parsed(acme.file.read_text())["arch"]["acme1"] == {
        "source": f"long ago; rope: {SOURCE}",
        "rms_norm": {"BLOCK": 32},
        "rope": {"num_warps": 16},
    }


def test_all_ops_again_are_all_measured_now(acme: Acme) -> None:
    tuned(acme, "rope")
    tuned(acme)
    assert parsed(acme.file.read_text())["arch"]["acme1"]["source"] == SOURCE


def test_what_a_chip_has_is_kept_and_is_nothing_measured(acme: Acme) -> None:
    acme.file.write_text(FILE + '\n[arch.acme1]\nsource = "untuned"\n\n[arch.acme1.limits]\nfp8 = true\n')
    tuned(acme)
    section = parsed(acme.file.read_text())["arch"]["acme1"]
    assert (section["source"], section["limits"]) == (SOURCE, {"fp8": True})


def test_another_file_is_made_of_the_backends_own(acme: Acme, tmp_path: Path) -> None:
    other = tmp_path / "mine.toml"
    found = tuned(acme, "rope", out=other)
    assert acme.file.read_text() == FILE
    assert other.read_text().startswith(FILE)
    assert found.file == str(other)


# --- what is not measured --------------------------------------------------------------------------------------------


def test_an_op_whose_calls_have_no_room_is_said_and_the_others_go_on(acme: Acme) -> None:
    def make(device: str) -> Any:
        raise torch.OutOfMemoryError("no room")

    calls = [*CALLS[:2], Workload("rope", "T1000000", make)]
    norm, rope = tune("acme", calls=calls, timer=acme.clock).ops
    assert (norm.skipped, rope.skipped) == ("", "no call of it fits the device's memory")
    assert "rope" not in parsed(acme.file.read_text())["arch"]["acme1"]


def test_an_op_that_nothing_calls_is_said(acme: Acme) -> None:
    (found,) = tune("acme", ("rope",), calls=[], timer=acme.clock).ops
    assert found.skipped == "no call of it is known"
    assert acme.file.read_text() == FILE


def test_a_call_that_the_kernel_does_not_take_is_not_timed(acme: Acme) -> None:
    acme.requires = [one_of("layout", "interleaved")]
    (found,) = tuned(acme, "rope").ops
    assert found.skipped == "layout must be one of 'interleaved', got 'half'"


def test_sizes_in_force_that_fail_are_said(acme: Acme) -> None:
    def clock(call: Any, device: str, budget: float) -> float:
        raise RuntimeError("device lost")

    (found,) = tune("acme", ("rope",), calls=CALLS, timer=clock).ops
    assert found.skipped == "with the sizes in force: RuntimeError: device lost"
    assert acme.file.read_text() == FILE


def test_an_interruption_keeps_what_was_measured(acme: Acme) -> None:
    def clock(call: Any, device: str, budget: float) -> float:
        taken = acme.clock(call, device, budget)
        if acme.running.keys() == {"num_warps"}:
            raise KeyboardInterrupt
        return taken

    with pytest.raises(KeyboardInterrupt):
        tune("acme", calls=CALLS, timer=clock)
    assert parsed(acme.file.read_text())["arch"]["acme1"].keys() == {"source", "rms_norm"}


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_backend_without_block_sizes_is_refused() -> None:
    with installed(stand_in("plain")):
        problem = raised(tune, "plain")
    assert problem.code == "CONFIG"
    assert "nothing to tune" in problem.what


def test_a_device_that_is_not_there_is_refused(acme: Acme) -> None:
    acme.device = Unavailable("no card", "plug it in")
    problem = raised(tuned, acme)
    assert (problem.code, problem.fix) == ("UNAVAILABLE", "plug it in")


@pytest.mark.parametrize(("only", "code"), [("rms", "UNKNOWN"), ("topk_indices", "CONFIG")])
def test_an_op_that_is_not_there_or_has_no_sizes_is_refused(acme: Acme, only: str, code: str) -> None:
    problem = raised(tuned, acme, only)
    assert problem.code == code


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(acme: Acme) -> None:
    acme.file.chmod(0o400)
    assert raised(tuned, acme).code == "CONFIG"
    assert acme.running == {}


def test_so_is_one_in_a_folder_that_is_not_there(acme: Acme, tmp_path: Path) -> None:
    problem = raised(tuned, acme, "rope", out=tmp_path / "nowhere" / "tuning.toml")
    assert problem.code == "CONFIG"
    assert "--out" in problem.fix
    assert acme.running == {}


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(acme: Acme, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(timing, "seconds_of", acme.clock)
    monkeypatch.setattr(workloads, "TUNED", (Load(2, 64),))

    def call(*words: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["glm5-hal", "tune", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return call


def test_as_a_table(run: Any, acme: Acme) -> None:
    code, out, _ = run("--backend", "acme", "--op", "rope")
    assert code == 0
    for said in ("num_warps=16", "4.00x", f"written to {acme.file}", "glm5-hal conformance run --backend acme"):
        assert said in out


def test_as_data(run: Any, acme: Acme) -> None:
    code, out, err = run("--backend", "acme", "--op", "r*", "--json")
    found = json.loads(out)
    assert (code, err, found["arch"], found["source"]) == (0, "", "acme1", SOURCE)
    assert [op["after"]["num_warps"] for op in found["ops"]] == [16, 16]
    assert all(op["gain"] > 1 for op in found["ops"])


def test_exit_codes(run: Any, acme: Acme) -> None:
    assert run("--backend", "nobody")[0] == 2
    assert run()[0] == 2
    acme.device = Unavailable("no card", "plug it in")
    code, _, err = run("--backend", "acme")
    assert code == 3
    assert "no card" in err


def test_its_table_says_where_nothing_was_found(acme: Acme) -> None:
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(tuning.render(tune("acme", ("rope",), calls=[], timer=acme.clock)))
    text = console.export_text()
    assert "no call of it is known" in text
    assert "nothing was written" in text
