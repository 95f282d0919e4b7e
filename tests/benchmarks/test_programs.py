"""Every benchmark runs, at toy widths, and measures what it says it does. Times are no test's business."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from glm5_hal import ops

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TESTED = ("dispatch", "memory", "ops_cpu", "ops_gpu", "transformers_attention")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark as a module, as fresh as a program. Threads are given back."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure = importlib.import_module("_measure")
    monkeypatch.setattr(measure, "MATRIX", 64)
    monkeypatch.setattr(measure, "NUMBERS", 1 << 16)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    yield load
    torch.set_num_threads(threads)


def test_every_program_is_tested() -> None:
    assert {p.stem for p in BENCHMARKS.glob("[!_]*.py")} == set(TESTED)


# --- dispatch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1e9, -1e9])
def test_dispatch_exits_with_1_where_a_path_is_over_its_budget(
    load: Any, budget: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load("dispatch")
    monkeypatch.setattr(program, "BUDGET", {"table": budget})
    assert program.main(["--calls", "5", "--repeat", "1"]) == (budget < 0)
    assert ("over" in capsys.readouterr().out) == (budget < 0)
    assert program.main(["--calls", "5", "--repeat", "1", "--json"]) == (budget < 0)
    assert json.loads(capsys.readouterr().out)["within"] == {"table": budget > 0}


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_measures_every_op_in_a_process_of_its_own(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load("memory")
    ops = {p.op: p for p in program.POINTS if p.tokens == 1}
    monkeypatch.setattr(program, "POINTS", [program.Point(p.op, 1, p.format, keys=128) for p in ops.values()])
    assert program.main(["--json"]) in (0, 1)  # calls this small may grow by more than they hold
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["op"] for row in rows] == list(ops)
    assert all(row["keys"] == 128 and row["limit_bytes"] > 0 and row["growth_bytes"] >= 0 for row in rows)


# --- the ops beside their peers --------------------------------------------------------------------------------------


def test_ops_cpu_measures_every_point(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load("ops_cpu")
    toy = {"HEADS": 1, "LATENT": 128, "ROPE": 2, "HEAD_DIM": 2, "INDEX_HEADS": 1, "INDEX_DIM": 128, "TOP_K": 4}
    for name, value in toy.items():
        monkeypatch.setattr(program, name, value)
    program.main(["--json", "--repeat", "1", "--threads", "1"])
    found = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in found["rows"]} == {points.__name__ for points in program.POINTS}
    for row in found["rows"]:
        assert row["ms"] > 0
        assert row["best_peer"] in row["peers_ms"]
        assert row["limit_ms"] > 0
    assert found["threads"] == 1


def test_ops_cpu_prints_a_table(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program = load("ops_cpu")
    program.main(["--op", "topk_indices", "--repeat", "1"])
    assert capsys.readouterr().out.count("topk_indices") == 2


# --- the ops on a GPU ------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(load: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program at toy widths; it takes a CPU for a GPU where it is told so."""
    program: ModuleType = load("ops_gpu")
    widths = {"hidden": 64, "heads": 2, "head": 8, "latent": 128, "rope": 4, "index_heads": 2, "index": 128}
    widths |= {"top_k": 16, "experts": 16, "here": 4, "per_token": 4, "inner": 8, "page": 8}
    monkeypatch.setattr(program, "WIDTHS", program.Widths(**widths))
    monkeypatch.setattr(program, "MATRIX", 64)
    monkeypatch.setattr(program, "COPIED", 1 << 16)
    loads = importlib.import_module("glm5_hal.conformance.workloads")
    monkeypatch.setattr(program, "SERVING", (loads.Load(2, 64), loads.Load(8, 40, True)))
    return program


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_ops_gpu_ends_with_3_and_a_fix_where_there_is_no_gpu(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("ops_gpu").main([]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert "UNAVAILABLE" in said.err
    assert "fix:" in said.err


def test_ops_gpu_measures_every_kernel_beside_its_peers(
    gpu: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu.main(["--backend", "cpu", "--json", "--seconds", "0.001", "--out", str(tmp_path / "rows")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["limits"]["copied"] > 0
    rows = {(row["op"], row["shape"], row["cache_format"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) > 20
    for row in rows.values():
        assert row["seconds"][row["chosen"]] > 0
        assert row["of_limit"] > 0
        assert row["bound"][row["chosen"]] in ("memory", "compute", "launch")
    prefill = rows["mla_prefill", "T8 S40", ""]
    assert set(prefill["seconds"]) == {"sdpa", "torch"}
    assert "torch sdpa" in {**prefill["peers"], **prefill["refused"]}
    assert {"torch sdpa"} <= rows["mla_decode", "B2 S64", "latent_576"]["peers"].keys()
    assert {"gather + sdpa"} <= rows["sparse_mla", "B2 S64", "latent_576"]["peers"].keys()
    assert len((tmp_path / "rows").read_text().splitlines()) == len(rows)


def test_some_of_the_providers(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--backend", "cpu", "--op", "mla_prefill", "--seconds", "0.001", "--json"]
    assert gpu.main([*asked, "--provider", "s*"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert set(row["seconds"]) == {"sdpa"}
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*asked, "--provider", "flash"])
    assert "there are sdpa, torch" in capsys.readouterr().err


def test_peers_compute_what_the_ops_compute(gpu: Any) -> None:
    found, peers = set(), importlib.import_module("_peers").peers
    for call in gpu.workloads(gpu.SERVING, gpu.WIDTHS):
        args = call.make("cpu")
        for name, peer in peers(call.op, args):
            if isinstance(peer, str) or not name.startswith(("torch", "gather")):
                continue
            made, ours = peer(), getattr(ops, call.op)(**args)
            ours = ours[0] if isinstance(ours, tuple) else ours
            if call.op == "mla_prefill":
                made = made[0].transpose(0, 1)
            elif call.op == "topk_indices":
                made = made.indices.sort(-1).values
            apart = (made.reshape(ours.shape).float() - ours.float()).norm()
            assert apart <= 0.01 * ours.float().norm(), (call.op, name)
            found.add(call.op)
    assert found >= {"mla_prefill", "mla_decode", "sparse_mla", "topk_indices", "rms_norm"}


def test_ops_gpu_prints_a_table(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--backend", "cpu", "--op", "topk_indices", "--seconds", "0.001"])
    out = capsys.readouterr().out
    assert out.count("topk_indices") == 2
    assert "measured now: copy" in out


def test_ops_gpu_says_what_does_not_fit_and_goes_on(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def calls(loads: Any, widths: Any) -> Any:
        def none(device: str) -> Any:
            raise torch.OutOfMemoryError("no room")

        yield gpu.Workload("rope", "T1", none)
        yield from [w for w in known(loads, widths) if w.op == "rope"]

    known = gpu.workloads
    monkeypatch.setattr(gpu, "workloads", calls)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    gpu.main(["--backend", "cpu", "--seconds", "0.001"])
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert out.count("rope") == 3


# --- transformers' attention -----------------------------------------------------------------------------------------

WIDTHS = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
}


def test_transformers_attention_compares_what_is_the_same(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="it needs Python 3.11")
    program = load("transformers_attention")
    monkeypatch.setattr(program, "WIDTHS", {**program.WIDTHS, **WIDTHS})
    monkeypatch.setattr(program, "CACHED", 40)
    monkeypatch.setattr(program, "PREFILL", 16)
    monkeypatch.setattr(
        program, "growths", lambda dtype, _: {w: program.growth(w, getattr(torch, dtype)) for w in program.WAYS}
    )
    program.main(["--json", "--dtype", "float32", "--threads", "1", "--repeat", "1"])
    found = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in found["rows"]] == [
        "core, 1 token, 40 cached",
        "core, layer after layer",
        "block, 1 token, 40 cached",
        "block, layer after layer",
        "block, prefill of 16",
    ]
    for row in found["rows"]:
        assert set(row["ms"]) == {"eager", "sdpa", "ours"}
        assert row["difference"] < 1e-5  # all three ways computed the same thing
    assert set(found["prefill_MB"]) == set(program.WAYS)
    assert found["bound_ms"] > 0
    program.main(["--dtype", "float32", "--threads", "1", "--repeat", "1"])
    assert "differ by" in capsys.readouterr().out
