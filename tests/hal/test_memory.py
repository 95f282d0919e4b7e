"""What a call writes is no other argument of it: the kernel would read what it has just written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import WRITE, installed, kernel_of, published, raised, spec_of, stand_in, toy

from glm5_hal import context
from glm5_hal.memory import check_apart
from glm5_hal.spec import Arg

BUFFER = torch.arange(96.0)
PAGES = BUFFER.view(4, 24)


@pytest.mark.parametrize(
    ("x", "cache"),
    [
        (BUFFER[:12], BUFFER[:12]),
        (BUFFER[:12], BUFFER[11:23]),
        (BUFFER[11:23], BUFFER[:12]),
        (PAGES[:, :8], PAGES[:, 7:12]),
        (PAGES[:, 20:], PAGES[:2].reshape(4, 12)),
        (BUFFER[3], BUFFER),
        (BUFFER[:12].view(torch.uint8), BUFFER[11:23]),
    ],
)
def test_tensors_that_may_share_a_byte(x: Any, cache: Any) -> None:
    problem = raised(check_apart, WRITE, {"x": x, "cache": cache})
    assert (problem.code, problem.value) == ("STRIDE", "x")
    assert problem.what == "toy_write: x shares memory with cache, which is written"
    assert problem.fix == "pass x as a tensor of its own: x.clone()"


@pytest.mark.parametrize(
    ("x", "cache"),
    [
        (BUFFER[:12], BUFFER[12:24]),
        (BUFFER[:12], BUFFER[:12].clone()),
        (PAGES[:, :8], PAGES[:, 8:]),
        (PAGES[:, 8:], PAGES[:, :8]),
        (PAGES[1:, :8], PAGES[:3, 8:]),
        (PAGES.view(torch.uint8)[:, :32], PAGES[:, 8:]),
        (BUFFER[::2], BUFFER[1::2]),
        (BUFFER[:0], BUFFER),
        (None, BUFFER),
    ],
)
def test_tensors_that_lie_beside_each_other(x: Any, cache: Any) -> None:
    check_apart(WRITE, {"x": x, "cache": cache})


def test_two_caches_in_the_pages_of_one_buffer_are_two_caches() -> None:
    def write(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
        """Both."""

    args = [Arg(name, "N P", "F", "") for name in ("x", "first", "second")]
    spec = spec_of("toy_both", write, args, mutates=("first", "second"))
    check_apart(spec, {"x": torch.ones(4, 8), "first": PAGES[:, :8], "second": PAGES[:, 8:]})
    problem = raised(check_apart, spec, {"x": torch.ones(4, 8), "first": PAGES[:, :8], "second": PAGES[:, :8]})
    assert problem.value == "second"


def test_a_call_is_checked_every_time_and_before_its_kernel_runs() -> None:
    def fails(x: torch.Tensor, cache: torch.Tensor) -> None:
        cache += x

    x, cache = torch.ones(2, 3), torch.zeros(2, 3)
    with published(), installed(stand_in("acme", [kernel_of(WRITE, fn=fails)])):
        op = toy(WRITE)
        op(x, cache)
        assert raised(op, cache, cache).code == "STRIDE"
        assert torch.equal(cache, x)
        with context.use(check="metadata"):
            op(cache, cache)
    assert torch.equal(cache, 2 * x)
