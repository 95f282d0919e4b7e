"""What is timed are calls that the ops take, of every op that has kernels of its own."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import glm5_hal
from glm5_hal import ops
from glm5_hal.conformance import timing
from glm5_hal.conformance.workloads import SERVING, TUNED, Load, Widths, Workload, workloads
from glm5_hal.ops import specs
from glm5_hal.ops._common.costs import cost_of

SMALL = Widths(
    hidden=64, heads=2, head=8, latent=128, rope=4, index_heads=2, index=128, top_k=16, experts=16, here=4,
    per_token=4, inner=8, page=8,
)  # fmt: skip
LOADS = (Load(1, 16), Load(3, 64), Load(8, 8, True), Load(9, 40, True))


@pytest.mark.parametrize("one", list(workloads(LOADS, SMALL)), ids=lambda w: f"{w.op} {w.shape} {w.cache_format}")
def test_a_workload_is_a_call_that_its_op_takes(one: Workload) -> None:
    args = one.make("cpu")
    with glm5_hal.use("cpu:torch,cpu", check="values"):
        getattr(ops, one.op)(**args)
    cost = cost_of(specs()[one.op], args, one.dtype)
    assert cost.bytes > 0
    assert 0 < one.share <= 1
    assert any(isinstance(v, torch.Tensor) and str(v.dtype)[6:] == one.dtype for v in args.values())


@pytest.mark.parametrize("loads", [SERVING, TUNED], ids=["serving", "tuned"])
def test_every_op_with_kernels_of_its_own_is_called(loads: tuple[Load, ...]) -> None:
    assert set(specs()) - {one.op for one in workloads(loads)} == {"indexer_prolog", "mla_prolog"}


def test_names_tell_the_calls_of_an_op_apart() -> None:
    names = [(one.op, one.shape, one.cache_format) for one in workloads()]
    assert len(names) == len(set(names))


# --- the clock -------------------------------------------------------------------------------------------------------


def test_a_call_is_timed_by_this_machines_clock_where_the_device_has_none() -> None:
    calls: list[None] = []

    def call() -> None:
        calls.append(None)
        time.sleep(0.01)

    assert 0.01 <= timing.seconds_of(call, "cpu", 0.05) < 1
    assert len(calls) >= 4


def test_and_by_the_devices_own_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between its events counts, not the reading before them, nor what the host does."""
    now, synchronized = [0.0], []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at)

    def call() -> None:
        now[0] += 2.0

    class Cold:
        def sum(self) -> None:
            now[0] += 100.0

    monkeypatch.setattr(
        torch, "acme", SimpleNamespace(Event=Event, synchronize=lambda: synchronized.append(None)), raising=False
    )
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: Cold())
    assert timing.seconds_of(call, "acme:0", 0.001) == pytest.approx(2e-3)
    assert synchronized


@pytest.mark.parametrize(("host", "covers"), [(0.0, 1), (0.01, 2), (0.09, 14), (1000.0, timing.COVERS)])
def test_the_device_is_kept_busy_until_it_has_the_whole_call(
    monkeypatch: pytest.MonkeyPatch, host: float, covers: int
) -> None:
    """A read that takes 10 ms, before a call that takes the host so long."""
    now = [0.0]
    monkeypatch.setattr(timing, "_by_its_own", lambda *args: [0.01])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += host

    module = SimpleNamespace(synchronize=lambda: None)
    assert timing._covers(call, lambda: None, module) == covers
