"""A user's own tensors: saved from a live call, judged like any case."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import first_sample
from typer.testing import CliRunner

from glm5_hal.conformance import replay, runner, tensorfile
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.cli import app
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import kernel
from glm5_hal.conformance.mutants.stand_in import NAME, Made, installed
from glm5_hal.conformance.target import targets
from glm5_hal.errors import HalError
from glm5_hal.ops import names, specs


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return replay.save("rms_norm", {"x": x, "weight": torch.rand(48), "eps": 1e-6}, tmp_path / "mine.safetensors")


def judged(path: Path, body: honest.Body) -> Any:
    with installed(Made("rms_norm", kernel("rms_norm", body))):
        return next(runner.run([replay.case(path)], targets(NAME), 0))


def test_it_is_judged_like_any_case(saved: Path) -> None:
    result = judged(saved, honest.rms_norm())
    assert (result.verdict, result.case, result.dtype) == ("PASS", "rms_norm[bfloat16-replay-mine]", "bfloat16")
    assert result.checks.keys() == CHECKS.keys()
    assert f"--replay {saved} --seed 0" in result.repro
    wrong = judged(saved, lambda a: honest.rms_norm()(a) * 1.01)
    assert (wrong.verdict, wrong.code) == ("FAIL", "accuracy")


def test_the_command_takes_it(saved: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(
        app, ["run", "--backend", "cpu:torch", "--replay", str(saved), "--out", str(tmp_path / "out"), "--json"]
    )
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["verdicts"] == {"PASS": 1}


@pytest.mark.parametrize("op", names())
def test_a_call_of_every_op_comes_back_bit_by_bit(op: str, tmp_path: Path) -> None:
    args = first_sample(specs()[op])
    spec, back = replay.load(replay.save(op, args, tmp_path / "call.safetensors"))
    assert spec.name == op
    assert back.keys() == args.keys()
    for name, value in args.items():
        if isinstance(value, torch.Tensor):
            assert runner.same_bits(value, back[name])
        else:
            assert back[name] == value


def test_what_the_op_refuses_is_refused_before_anything_runs(tmp_path: Path) -> None:
    args = first_sample(specs()["topk_indices"])
    args["seq_lens"] = args["seq_lens"] + 10_000
    with pytest.raises(HalError) as raised:
        replay.case(replay.save("topk_indices", args, tmp_path / "long.safetensors"))
    assert raised.value.code == "VALUE"


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, "x has 12 bytes for F32 [4]"),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, "x lies outside the file"),
        ({"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "x lies outside the file"),
        ({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}}, "'F4'"),
        ({"x": [1, 2]}, "is no safetensors file"),
        ([], "is no safetensors file"),
    ],
)
def test_a_broken_file_is_an_error_that_says_where(tmp_path: Path, header: Any, what: str) -> None:
    text, path = json.dumps(header).encode(), tmp_path / "broken.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(HalError) as raised:
        tensorfile.read(path)
    assert raised.value.code == "CONFIG"
    assert what in raised.value.what


def test_no_tensor_is_made_of_a_file_of_which_one_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"x": good, "y": {**good, "data_offsets": [8, 99]}}).encode()
    (tmp_path / "broken").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    made: list[object] = []
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: made.append(a))
    with pytest.raises(HalError, match="y lies outside the file"):
        tensorfile.read(tmp_path / "broken")
    assert made == []


@pytest.mark.parametrize("data", [b"", b"12345", struct.pack("<Q", 1 << 40) + b"{}"])
def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "short").write_bytes(data)
    with pytest.raises(HalError) as raised:
        tensorfile.read(tmp_path / "short")
    assert raised.value.code == "CONFIG"


def test_the_library_reads_what_is_written_here_and_the_other_way_round(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5), "none": torch.empty(0, 2)}
    tensorfile.write(tmp_path / "ours", tensors, {"op": "x"})
    theirs = library.load_file(tmp_path / "ours")
    assert all(torch.equal(theirs[n], t) for n, t in tensors.items())
    library.save_file(tensors, tmp_path / "theirs", metadata={"op": "x"})
    ours, metadata = tensorfile.read(tmp_path / "theirs")
    assert metadata == {"op": "x"}
    assert all(torch.equal(ours[n], t) for n, t in tensors.items())


@pytest.mark.parametrize(
    ("metadata", "code"),
    [({}, "CONFIG"), ({"op": "rms_nrom"}, "UNKNOWN"), ({"op": "rms_norm", "scalars": "["}, "CONFIG")],
)  # fmt: skip
def test_a_file_without_its_op_is_an_error(tmp_path: Path, metadata: dict[str, str], code: str) -> None:
    tensorfile.write(tmp_path / "f", {"x": torch.ones(2, 4)}, metadata)
    with pytest.raises(HalError) as raised:
        replay.load(tmp_path / "f")
    assert raised.value.code == code
