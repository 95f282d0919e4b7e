"""Step plans: lengths read once, schedules built once, both only while they are true."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import raised

import glm5_hal
from glm5_hal import StepPlan, rope_tables
from glm5_hal.plan import current_plan, host_list, schedule


def batch(lens: list[int], queries: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = [0, *itertools.accumulate(queries)]
    return torch.tensor(lens, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)


@pytest.fixture
def plan() -> Iterator[StepPlan]:
    made = StepPlan.build(*batch([7, 3, 9], [2, 0, 3]))
    with made.active():
        yield made


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per read of a tensor's values."""
    made: list[int] = []
    tolist = torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> Any:
        made.append(1)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    return made


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=6))
def test_a_plan_holds_lengths_and_their_maxima(pairs: list[tuple[int, int]]) -> None:
    lens, queries = [a for a, _ in pairs], [b for _, b in pairs]
    plan = StepPlan.build(*batch(lens, queries))
    assert plan.host["seq_lens"] == tuple(lens)
    assert plan.host["cu_seqlens_q"] == (0, *itertools.accumulate(queries))
    assert (plan.max_seq_len, plan.max_q_len) == (max(lens, default=0), max(queries, default=0))


def test_with_host_lists_nothing_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seq_lens, offsets = batch([7, 3], [1, 2])
    seen = reads(monkeypatch)
    plan = StepPlan.build(seq_lens, offsets, host_seq_lens=[7, 3], host_cu_seqlens_q=(0, 1, 3))
    with plan.active():
        assert (host_list(seq_lens), host_list(offsets)) == ((7, 3), (0, 1, 3))
    assert seen == []
    StepPlan.build(seq_lens, offsets)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("tensors", "host", "code"),
    [
        (batch([7, 3], [1]), {}, "SHAPE"),
        (batch([7], [1]), {"host_seq_lens": [7, 7]}, "SHAPE"),
        (batch([7], [1]), {"host_cu_seqlens_q": [0]}, "SHAPE"),
        (batch([], []), {"host_cu_seqlens_q": []}, "SHAPE"),
        (batch([7, 3], [2, -1]), {}, "VALUE"),
        (batch([-1], [1]), {}, "VALUE"),
        (batch([7], [1]), {"host_cu_seqlens_q": [1, 2]}, "VALUE"),
    ],
)
def test_lengths_that_do_not_fit_together(tensors: Any, host: dict[str, Any], code: str) -> None:
    problem = raised(StepPlan.build, *tensors, **host)
    assert problem.code == code
    assert problem.what.startswith("StepPlan: ")


def test_kernels_read_the_active_plan_without_a_sync(monkeypatch: pytest.MonkeyPatch, plan: StepPlan) -> None:
    seen = reads(monkeypatch)
    assert current_plan() is plan
    assert host_list(plan.seq_lens) == (7, 3, 9)
    assert host_list(plan.cu_seqlens_q.view(-1)) == (0, 2, 2, 5), "another tensor of the same memory"
    assert seen == []
    assert host_list(torch.tensor([7, 3, 9], dtype=torch.int32)) == (7, 3, 9), "equal values elsewhere are read"
    assert len(seen) == 1


def test_without_a_plan_the_device_is_read() -> None:
    assert current_plan() is None
    assert host_list(torch.tensor([4, 5])) == (4, 5)


def test_other_elements_of_the_same_memory_are_not_the_plans() -> None:
    memory = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    plan = StepPlan.build(memory[:2], torch.tensor([0, 1, 2], dtype=torch.int32))
    with plan.active():
        assert host_list(memory[:2]) == (1, 2)
        assert host_list(memory[::2]) == (1, 3)
        assert host_list(memory[:3]) == (1, 2, 3)
        assert host_list(memory[:2].view(torch.float32)) != (1, 2)


def test_a_plan_whose_lengths_were_written_since_is_not_believed(plan: StepPlan) -> None:
    built: list[str] = []

    def build() -> int:
        built.append("tiles")
        return len(built)

    assert schedule("tiles", build) == schedule("tiles", build) == 1
    plan.seq_lens.add_(1)
    assert host_list(plan.seq_lens) == (8, 4, 10)
    assert host_list(plan.cu_seqlens_q) == (0, 2, 2, 5), "the other one was not written"
    assert schedule("tiles", build) == 2


def test_inference_tensors_are_believed() -> None:
    """They have no write counter; whoever writes them makes a new plan."""
    with torch.inference_mode():
        plan = StepPlan.build(*batch([7, 3], [1, 2]))
        with plan.active():
            assert host_list(plan.seq_lens) == (7, 3)
    assert plan.seq_lens.is_inference()


def test_plans_nest_and_end_with_their_block(plan: StepPlan) -> None:
    inner = StepPlan.build(*batch([1], [1]))

    def fail() -> None:
        with inner.active():
            assert current_plan() is inner
            assert host_list(inner.seq_lens) == (1,)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert current_plan() is plan
    assert host_list(plan.seq_lens) == (7, 3, 9)


def test_another_thread_has_no_plan(plan: StepPlan) -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(current_plan()))
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_schedule_is_built_once_per_step_and_key(plan: StepPlan) -> None:
    built: list[str] = []

    def build(key: str) -> Any:
        return schedule(key, lambda: built.append(key) or object())

    assert build("a") is build("a")
    assert build("a") is not build("b")
    assert built == ["a", "b"]
    with StepPlan.build(*batch([1], [1])).active():
        build("a")
    assert built == ["a", "b", "a"]


def test_a_schedule_may_be_built_from_another(plan: StepPlan) -> None:
    assert schedule("outer", lambda: schedule("inner", lambda: 2) + 1) == 3
    assert schedule("inner", lambda: 0) == 2


def test_without_a_plan_a_schedule_is_built_every_time() -> None:
    numbers = itertools.count()
    assert [schedule("a", lambda: next(numbers)) for _ in range(2)] == [0, 1]


def test_a_schedule_is_built_once_by_many_threads(plan: StepPlan) -> None:
    import contextvars

    built: list[int] = []

    def build() -> None:
        built.append(1)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(schedule, "a", build)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]


def test_it_is_reached_from_the_package() -> None:
    assert glm5_hal.StepPlan is StepPlan
    assert glm5_hal.rope_tables is rope_tables
