"""What is only read stays as it is, at the end and all the time."""

from __future__ import annotations

from typing import Any

import torch
from trying import caught_by, said

from glm5_hal.conformance.checks.integrity import Writes
from glm5_hal.conformance.intercept import operations
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args

NORM = honest.rms_norm()


def test_an_input_that_is_borrowed_and_put_back_is_caught_by_this_check_alone() -> None:
    def borrows(a: Args) -> Any:
        kept, y = a.x.clone(), NORM(a)
        a.x.zero_()
        a.x.copy_(kept)
        return y

    how: dict[str, Any] = {"samples": ("tokens",)}
    assert caught_by("rms_norm", borrows, **how) == {"integrity"}
    assert said("rms_norm", borrows, "integrity", **how) == "failed: wrote to its input x and put it back"


def test_every_way_to_write_is_seen_and_reading_is_none() -> None:
    x, y = torch.ones(4), torch.ones(4)
    ways = [
        lambda: x.add_(1),
        lambda: torch.add(y, 1, out=x),
        lambda: x[1:].fill_(2),
        lambda: torch._foreach_add_([y, x], 1.0),
        lambda: x.index_put_((torch.tensor([0]),), torch.tensor([3.0])),
    ]
    for way in ways:
        with operations(writes := Writes({"x": x})):
            way()
        assert writes.found == ["x"]
    with operations(writes := Writes({"x": x})):
        y.copy_(x)
        x.clone().mul_(2)
    assert writes.found == []
