"""Sampled calls are judged, and nothing else changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import glm5_hal
from glm5_hal import context, ops, shadow
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.mutants.stand_in import NAME, Made, installed
from glm5_hal.ops import names, specs
from glm5_hal.ops._common.references import reference_of
from glm5_hal.shadow import judging


def records(file: Path) -> list[dict[str, Any]]:
    assert shadow.flush()
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def sampled(file: Path, what: str = "*:1") -> None:
    glm5_hal.watch(shadow=f"{what};file={file}")


def arguments(op: str, dtype: str = "bfloat16") -> dict[str, Any]:
    spec = specs()[op]
    sample = next(iter(spec.samples()))
    return dict(spec.inputs(sample, dtype if dtype in sample.dtypes else sample.dtypes[0], Draw(0, op)).args)


@pytest.mark.parametrize("op", names())
def test_every_op_can_be_sampled_and_our_own_kernels_are_right(op: str, file: Path) -> None:
    args = arguments(op)
    with torch.inference_mode():
        plain = getattr(ops, op)(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in args.items()})
        sampled(file, f"{op}:1")
        again = getattr(ops, op)(**args)
    pairs = zip(plain, again, strict=True) if isinstance(plain, tuple) else [(plain, again)]
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    (record,) = records(file)
    assert (record["op"], record["ok"], record["proves"]) == (op, True, True), record
    assert record["excess"] < 1
    assert record["pid"] == os.getpid()


def test_a_wrong_kernel_is_found_and_its_shapes_are_named(file: Path) -> None:
    right = reference_of("rms_norm")

    def wrong(x: Any, weight: Any, *, eps: float) -> Any:
        return right(x, weight, eps=eps) * (1.05 if len(x) > 3 else 1)

    sampled(file)
    with installed(Made("rms_norm", wrong)), glm5_hal.use(NAME):
        ops.rms_norm(torch.randn(2, 64), torch.ones(64), eps=1e-5)
        ops.rms_norm(torch.randn(7, 64), torch.ones(64), eps=1e-5)
    good, bad = records(file)
    assert good["ok"]
    assert not bad["ok"]
    assert bad["excess"] > 1
    assert bad["signature"].startswith("x:float32[7, 64]")
    assert bad["kernel"] == "standin:native"


def test_the_inputs_are_those_before_the_call_and_the_results_those_after_it(file: Path) -> None:
    args = arguments("mla_cache_write")
    sampled(file)
    ops.mla_cache_write(**args)
    for value in args.values():
        if isinstance(value, torch.Tensor):
            value.zero_()  # what the caller does next
    (record,) = records(file)
    assert record["ok"], record


def test_only_the_pages_that_a_call_touches_are_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "CALL_BYTES", 100_000)
    cache = torch.zeros(4096, 8, 128 + 16, dtype=torch.bfloat16)  # 9 MiB
    q = torch.randn(1, 3, 144).bfloat16()
    table = torch.tensor([[4000, 17]], dtype=torch.int32)
    cache[4000], cache[17] = torch.randn(8, 144).bfloat16(), torch.randn(8, 144).bfloat16()
    lens, offsets = torch.tensor([11], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    sampled(file)
    ops.mla_decode(q, cache, table, lens, offsets, scale=0.1, kv_lora_rank=128)
    (record,) = records(file)
    assert record.get("ok"), record


def test_a_call_that_is_too_large_is_skipped_and_the_reason_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "CALL_BYTES", 100)
    sampled(file)
    ops.rms_norm(torch.randn(2, 64), torch.ones(64), eps=1e-5)
    monkeypatch.setattr(judging, "MOST_FLOPS", 10)
    ops.rms_norm(torch.randn(2, 64), torch.ones(64), eps=1e-5)
    large, dear = records(file)
    assert "MiB" in large["skipped"]
    assert "operations" in dear["skipped"]


def test_a_share_of_the_calls_is_sampled_and_always_the_first(file: Path) -> None:
    sampled(file, "rms_norm:0.2")
    x, weight = torch.randn(2, 8), torch.ones(8)
    ops.rms_norm(x, weight, eps=1e-5)
    assert len(records(file)) == 1
    for _ in range(200):
        ops.rms_norm(x, weight, eps=1e-5)
    assert 15 < len(records(file)) < 80  # 41 expected, 5.7 the standard deviation


def test_ops_that_match_no_rule_are_not_wrapped(file: Path) -> None:
    sampled(file, "topk_*:1")
    ops.rms_norm(torch.randn(2, 8), torch.ones(8), eps=1e-5)
    assert records(file) == []


def test_the_environment_switches_it_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM5_SHADOW", f"rms_norm:1;file={file}")
    context.reset()
    ops.rms_norm(torch.randn(2, 8), torch.ones(8), eps=1e-5)
    assert [r["op"] for r in records(file)] == ["rms_norm"]


def test_a_composites_parts_are_sampled_too(file: Path) -> None:
    args = arguments("moe_experts")
    sampled(file)
    with torch.inference_mode():
        ops.moe_experts(**args)
    found = {r["op"] for r in records(file)}
    assert found == {"moe_experts", "moe_permute", "grouped_gemm", "silu_and_mul", "moe_combine"}


def test_a_full_queue_skips_and_does_not_grow(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "WAITING_BYTES", 3000)
    slow = judging.judged

    def held(call: Any) -> Any:
        import time

        time.sleep(0.2)
        return slow(call)

    monkeypatch.setattr(judging, "judged", held)
    sampled(file)
    for _ in range(10):
        ops.rms_norm(torch.randn(2, 64), torch.ones(64), eps=1e-5)
    skipped = [r for r in records(file) if "skipped" in r]
    assert len(skipped) >= 5
    assert "wait" in skipped[0]["skipped"]


@pytest.mark.parametrize("most", [1 << 20, 0], ids=["judged", "skipped"])
def test_a_file_that_cannot_be_written_breaks_no_call_and_is_said_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    monkeypatch.setattr(judging, "CALL_BYTES", most)
    sampled(file)
    file.mkdir()  # after the setting was read
    for tokens in (1, 2, 3):
        ops.rms_norm(torch.randn(tokens, 64), torch.ones(64), eps=1e-5)
    assert shadow.flush(20), "the judge works on"
    (said,) = caplog.records
    assert str(file) in said.getMessage()
    file.rmdir()
    ops.rms_norm(torch.randn(4, 64), torch.ones(64), eps=1e-5)
    assert len(records(file)) == 1


def test_the_rate_holds_where_every_call_has_a_shape_of_its_own(file: Path) -> None:
    """As in serving, where the number of tokens is seldom the same twice."""
    sampled(file, "*:0.1")
    for tokens in range(1, 201):
        ops.rms_norm(torch.randn(tokens, 8), torch.ones(8), eps=1e-5)
    assert 5 < len(records(file)) < 50  # 21 expected, 4.2 the standard deviation
    ops.silu_and_mul(torch.randn(2, 8))
    assert records(file)[-1]["op"] == "silu_and_mul", "the first of each op is always sampled"
