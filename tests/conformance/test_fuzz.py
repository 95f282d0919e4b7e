"""Hypothesis finds what the samples do not have, shrinks it, keeps it, and tries it first the next time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trying import NARROW
from typer.testing import CliRunner

from glm5_hal import ops
from glm5_hal.conformance import drawing, fuzz, runner
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.cli import app
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args, kernel
from glm5_hal.conformance.mutants.stand_in import NAME, Made, installed, judge
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.target import targets
from glm5_hal.errors import HalError
from glm5_hal.ops import names, specs
from glm5_hal.spec import Sample

NORM = honest.rms_norm()


def wrong_at_odd_widths(a: Args) -> Any:
    """Vectors of two: right at every width of the samples but one, and these are 515 and 1."""
    y = NORM(a)
    if y.shape[-1] % 4 == 3 and y.shape[-1] not in (515,) and len(y):
        y[..., -1] = 0
    return y


def fuzzed(body: honest.Body, corpus: Path, examples: int = 60, seed: int = 0) -> list[Result]:
    with installed(Made("rms_norm", kernel("rms_norm", body))):
        (target,) = targets(NAME)

        def judge(case: Case) -> Result:
            return next(runner.run([case], [target], seed))

        return list(fuzz.run(judge, "rms_norm", examples, seed, corpus))


def test_it_finds_a_width_that_no_sample_has_and_makes_it_small(tmp_path: Path) -> None:
    failed = [r for r in judge("rms_norm", kernel("rms_norm", wrong_at_odd_widths), dtypes=NARROW) if not r.ok]
    assert {r.case.partition("-")[2] for r in failed} <= {"drawn]"}
    *passed, last = fuzzed(wrong_at_odd_widths, tmp_path)
    assert all(r.ok for r in passed)
    assert last.verdict == "FAIL"
    (kept,) = tmp_path.glob("rms_norm/*.json")
    axes = json.loads(kept.read_text())["axes"]
    assert axes == {"T": 1, "D": 3}
    assert last.repro == (
        f"glm5-hal conformance fuzz --backend standin:native --op rms_norm --examples 0 --seed 0 --corpus {tmp_path}"
    )


def test_what_failed_once_is_tried_first(tmp_path: Path) -> None:
    failure = fuzzed(wrong_at_odd_widths, tmp_path)[-1]
    again = fuzzed(wrong_at_odd_widths, tmp_path, examples=0)
    assert [(r.case, r.verdict, r.inputs) for r in again] == [(failure.case, "FAIL", failure.inputs)]
    assert [r.verdict for r in fuzzed(NORM, tmp_path, examples=0)] == ["PASS"]


def test_an_honest_kernel_passes_and_the_seed_chooses_other_cases(tmp_path: Path) -> None:
    one, again, other = (fuzzed(NORM, tmp_path, examples=8, seed=seed) for seed in (1, 1, 2))
    assert all(r.ok for r in (*one, *other))
    assert [r.case for r in one] == [r.case for r in again]
    assert [r.case for r in one] != [r.case for r in other]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("text", ["", "{}", '{"op": "rms_norm", "dtype": "float32", "axes": 3, "fill": "normal"}'])
def test_a_corpus_that_is_damaged_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "rms_norm").mkdir()
    (tmp_path / "rms_norm" / "x.json").write_text(text)
    with pytest.raises(HalError) as raised:
        fuzzed(NORM, tmp_path, examples=0)
    assert raised.value.code == "CONFIG"


@pytest.mark.parametrize("op", names())
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_op_draws_inputs_that_it_takes(op: str, data: st.DataObject) -> None:
    spec = specs()[op]
    assert spec.fuzz is not None
    case = fuzz.drawn(spec, fuzz.Picked(data))
    args = spec.inputs(case.sample, case.dtype, Draw(0, case.id)).args
    getattr(ops, op).describe(**args)
    if spec.check_values is not None:
        spec.check_values(args)


def test_a_case_survives_the_corpus(tmp_path: Path) -> None:
    sample = Sample("fuzz", {"lens": ((1, 2), (3, 4)), "scale": 0.07, "holes": True, "limit": None})
    case = drawing.point("sparse_mla", "bfloat16", sample)
    fuzz.keep(tmp_path, case)
    (back,) = fuzz.of_corpus(tmp_path, "sparse_mla")
    assert (back.id, back.sample.axes) == (case.id, sample.axes)


def test_the_command_reports_like_any_run(tmp_path: Path) -> None:
    how = ["fuzz", "--backend", "cpu:torch", "--op", "rms_norm", "--examples", "5", "--json"]
    said = CliRunner().invoke(app, [*how, "--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["verdicts"]["PASS"] >= 1
    assert (tmp_path / "out" / "fuzz.jsonl").exists()


ABORTS = """
import os
import torch
from glm5_hal import hookimpl
from glm5_hal.backend import Backend, Device, kernel

@kernel("rms_norm", "native")
def rms_norm(x, weight, *, eps):
    if x.shape[-1] % 4 == 3 and x.shape[-1] != 515 and len(x):
        os.abort()
    wide = x.double()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)

@hookimpl
def glm5_backend():
    return Backend("aborts", "cpu", lambda: Device("cpu", "aborts", "x", evidence="simulated"), lambda: (rms_norm,))
"""


def test_a_kernel_that_ends_its_process_is_a_crash_and_made_small(tmp_path: Path) -> None:
    (tmp_path / "aborts.py").write_text(ABORTS)
    how = ["fuzz", "--plugin", str(tmp_path / "aborts.py"), "--op", "rms_norm", "--op", "silu_and_mul"]
    how += ["--examples", "25", "--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), "--json"]
    said = CliRunner().invoke(app, how)
    assert said.exit_code == 1, said.output
    verdicts = json.loads(said.stdout)["verdicts"]
    assert verdicts["CRASH"] == 1
    assert verdicts["UNSUPPORTED"] == 25
    (kept,) = tmp_path.glob("corpus/rms_norm/*.json")
    assert json.loads(kept.read_text())["axes"] == {"T": 1, "D": 3}
