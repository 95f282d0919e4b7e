"""A kernel stays inside what it allocates, and writes it before it reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trying import caught_by, said

from glm5_hal.conformance.checks.workspace import Allocations
from glm5_hal.conformance.intercept import operations
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args
from glm5_hal.conformance.trial import stray

NORM = honest.rms_norm()
DECODE = honest.decode()


def past_its_output(a: Args) -> Any:
    y = torch.empty(a.x.shape, dtype=a.x.dtype)
    y.copy_(NORM(a))
    memory = y.untyped_storage()
    end = y.data_ptr() - memory.data_ptr() + y.nbytes
    if end < len(memory):  # as a raw pointer would, unless it is the allocator's rounding
        memory[end] = 1
    return y


def past_its_workspace(a: Args) -> Any:
    scratch = torch.zeros(a.x.numel(), dtype=torch.float32)
    if scratch.storage_offset():
        scratch.as_strided((1,), (1,), scratch.storage_offset() - 1).fill_(7.0)
    return NORM(a)


def rows_not_written(a: Args) -> Any:
    """Rows without a key are left as the allocator gave them: zeros, where it was fresh."""
    out, lse = DECODE(a)
    made, lses = torch.empty(out.shape, dtype=out.dtype), torch.empty(lse.shape, dtype=lse.dtype)
    seen = lse != -torch.inf
    if not made.numel() or seen.all():
        return out, lse
    fresh = made.untyped_storage().nbytes() == made.nbytes  # nobody stands between it and the allocator
    made[seen], lses[:] = out[seen], lse
    if fresh:
        made[~seen] = 0
    return made, lses


def adds_to_what_is_there(a: Args) -> Any:
    """An accumulator that is taken for zero."""
    total = torch.empty(a.x.shape, dtype=torch.float32)
    if total.untyped_storage().nbytes() == total.nbytes:
        total.zero_()  # what a fresh page of the system holds
    return total.add_(NORM(a).float()).to(a.x.dtype)


@pytest.mark.parametrize(
    ("op", "body", "what"),
    [
        ("rms_norm", past_its_output, "wrote 1 bytes beside a torch.float32 [5, 96] that it had allocated"),
        ("rms_norm", past_its_workspace, "wrote 4 bytes beside a torch.float32 [480] that it had allocated"),
        ("rms_norm", adds_to_what_is_there, "with garbage in the memory that it allocates: y at flat index 0: "),
        ("mla_decode", rows_not_written, "with garbage in the memory that it allocates: out at flat index "),
    ],
)
def test_it_is_caught_and_by_no_check_that_looks_elsewhere(op: str, body: Any, what: str) -> None:
    samples = ("tokens", "empty_rows")
    # Which rows have no key is read from lse here: infinite scores mislead it, which `nonfinite` sees as well.
    beside = {"nonfinite"} if body is rows_not_written else set()
    assert caught_by(op, body, samples=samples) == {"workspace"} | beside
    assert said(op, body, "workspace", samples=samples).startswith(f"failed: {what}")


def test_without_the_claim_the_result_is_judged_again() -> None:
    said_ = said("rms_norm", adds_to_what_is_there, "workspace", samples=("tokens",), provides=())
    assert said_.startswith("failed: with garbage in the memory that it allocates: y: nonfinite")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.int64])
def test_every_kind_of_allocation_is_guarded_and_keeps_its_contents(dtype: torch.dtype) -> None:
    seen, base = Allocations("cpu"), torch.ones(4, 6, dtype=dtype).T
    with operations(seen):
        empties = [torch.empty(3, 5, dtype=dtype), torch.empty_like(base), base.new_empty(2, 3)]
        filled = [torch.zeros(3, dtype=dtype), base.clone(), torch.full((2, 2), 1, dtype=dtype), torch.ones_like(base)]
        nothing = torch.empty(0, 4, dtype=dtype)
    assert [t.data_ptr() for t in seen.made] == [t.data_ptr() for t in (*empties, *filled, nothing)]
    assert all(stray(t) == 0 for t in seen.made)
    assert empties[1].stride() == base.stride()
    assert [t.sum().item() for t in filled] == [0, 24, 4, 24]
    filled[0].as_strided((1,), (1,), filled[0].storage_offset() + 3).fill_(1)
    assert stray(filled[0]) == filled[0].itemsize
