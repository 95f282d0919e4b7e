"""Calls in two threads do not see each other, and a forked child computes what its parent did."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from trying import caught_by, said

from glm5_hal.conformance.checks import threads
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args

NORM = honest.rms_norm()
FROM: dict[str, Any] = {"samples": ("tokens",)}


def one_scratch() -> Any:
    """A buffer of the module for all calls: right, as long as there is one at a time."""
    scratch: dict[Any, torch.Tensor] = {}

    def body(a: Args) -> Any:
        kept = scratch.setdefault((a.x.shape, a.x.dtype), torch.empty(a.x.shape, dtype=a.x.dtype))
        kept.copy_(a.x)
        return NORM(Args(x=kept, weight=a.weight, eps=a.eps)).clone()

    return body


def settings_of_the_process() -> Any:
    """A global that one call sets for itself."""
    now: list[Any] = [None]

    def body(a: Args) -> Any:
        now[0] = a.weight
        wide = a.x.float().square().mean(-1, keepdim=True)
        return (a.x.float() * torch.rsqrt(wide + a.eps) * now[0].float()).to(a.x.dtype)

    return body


@pytest.mark.parametrize("make", [one_scratch, settings_of_the_process])
def test_what_two_threads_share_is_caught_every_time_by_this_check_alone(make: Any) -> None:
    assert caught_by("rms_norm", make(), **FROM) == {"threads"}
    for _ in range(5):
        assert said("rms_norm", make(), "threads", checks=("threads",), **FROM).startswith(
            "failed: two threads by turns: "
        )


def test_a_kernel_with_a_lock_passes() -> None:
    lock, body = threading.Lock(), one_scratch()

    def locked(a: Args) -> Any:
        with lock:
            return body(a)

    assert caught_by("rms_norm", locked, **FROM) == set()


def test_a_kernel_that_only_the_first_thread_may_call_is_caught() -> None:
    def here(a: Args) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no context in this thread")
        return NORM(a)

    assert caught_by("rms_norm", here, **FROM) == {"threads"}
    assert "no context in this thread" in said("rms_norm", here, "threads", **FROM)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
def test_a_kernel_that_is_wrong_after_a_fork_is_caught() -> None:
    parent = os.getpid()

    def forgets(a: Args) -> Any:
        y = NORM(a)
        return y if os.getpid() == parent else y * 2

    assert caught_by("rms_norm", forgets, **FROM) == {"threads"}
    assert said("rms_norm", forgets, "threads", **FROM).startswith("failed: after a fork: y at flat index 0: ")


@needs_fork
def test_a_child_that_dies_or_hangs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CHILD", 0.2)
    assert threads.in_child(lambda: "") == ""
    assert threads.in_child(lambda: "other bits") == "other bits"
    assert threads.in_child(lambda: os._exit(3)) == "the child ended with status 768"
    assert threads.in_child(lambda: threading.Event().wait() and "") == "no answer within 0 s"
