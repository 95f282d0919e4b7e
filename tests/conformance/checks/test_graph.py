"""A captured kernel computes anew at every replay. The device here is a tape: it records the torch operations of a call
and runs them again on the same tensors, as a device graph runs its kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from trying import caught_by, failing, said

from glm5_hal.conformance.checks import graph
from glm5_hal.conformance.intercept import operations
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args

SAFE = ("deterministic", "graph_safe")


def tape(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    steps: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], Any]] = []

    def recording(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if func.overloadpacket.__name__ in ("item", "_local_scalar_dense"):
            raise RuntimeError("a sync while a graph is being captured")
        out = func(*args, **kwargs)
        steps.append((func, args, kwargs, out))
        return out

    def replay() -> None:
        for func, args, kwargs, out in steps:
            again = func(*args, **kwargs)
            pairs = zip(again, out, strict=True) if isinstance(out, (tuple, list)) else [(again, out)]
            for new, old in pairs:
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)

    with operations(recording):
        returned = call()
    return replay, returned


@pytest.fixture(autouse=True)
def _a_device_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "recorder_of", lambda device: tape)


def norm(a: Args) -> Any:
    wide = a.x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + a.eps) * a.weight.float()).to(a.x.dtype)


def with_the_hosts_numbers(a: Args) -> Any:
    """Reads on the host, when it is called, what a replay should read on the device."""
    y = norm(a)
    weight = torch.from_numpy(a.weight.float().numpy().copy())
    wide = a.x.float()
    return (
        y if a.x.dtype != torch.float32 else wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + a.eps) * weight
    )


def waits(a: Args) -> Any:
    return norm(a) if float(a.x.sum()) != 12345.0 else a.x.clone()


FROM: dict[str, Any] = {"samples": ("tokens",), "provides": SAFE, "dtypes": ("float32",)}


def test_a_safe_kernel_is_the_same_bits_at_every_replay() -> None:
    assert caught_by("rms_norm", norm, **FROM) == set()


def test_what_was_read_on_the_host_is_caught_by_this_check_alone() -> None:
    assert caught_by("rms_norm", with_the_hosts_numbers, **FROM) == {"graph"}
    assert said("rms_norm", with_the_hosts_numbers, "graph", **FROM).startswith(
        "failed: replayed on other inputs: y at "
    )


def test_a_kernel_that_waits_for_its_device_is_caught() -> None:
    assert "a sync while a graph is being captured" in said("rms_norm", waits, "graph", **FROM)


def test_without_the_claim_nothing_is_captured() -> None:
    from glm5_hal.conformance.mutants.stand_in import judge

    (result,) = judge("rms_norm", honest.kernel("rms_norm", waits), dtypes=("float32",), samples=("tokens",))
    assert result.ok
    assert result.checks["graph"] == "n/a: the kernel does not claim graph_safe"
    assert failing(result) == set()


def test_the_cpu_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert graph.recorder_of("cpu") is None
