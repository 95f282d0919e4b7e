"""Arguments may share memory where none of them is written."""

from __future__ import annotations

from typing import Any

import torch
from trying import caught_by, said

from glm5_hal.conformance.cases import cases
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args

ADD, ROPE = honest.add_rms_norm(), honest.rope()


def same_tensor_once(a: Args) -> Any:
    """Sums a residual stream that is the update itself only once."""
    if a.x.data_ptr() == a.residual.data_ptr() and a.x.numel():
        a.residual = torch.zeros_like(a.x)
    return ADD(a)


def in_place_if_shared(a: Args) -> Any:
    y, h = ADD(a)
    return y, a.residual.copy_(h) if a.x.data_ptr() == a.residual.data_ptr() else h


def by_storage(a: Args) -> Any:
    """Takes two views of one allocation for one tensor."""
    if a.cos.untyped_storage().data_ptr() == a.sin.untyped_storage().data_ptr():
        a.sin = a.cos
    return ROPE(a)


def test_one_tensor_passed_twice_is_caught_by_this_check_alone() -> None:
    how: dict[str, Any] = {"samples": ("tokens",)}
    assert caught_by("add_rms_norm", same_tensor_once, **how) == {"alias"}
    assert said("add_rms_norm", same_tensor_once, "alias", **how).startswith(
        "failed: with one tensor as x and residual: "
    )


def test_an_input_written_only_when_it_is_shared_is_caught() -> None:
    what = said("add_rms_norm", in_place_if_shared, "alias", samples=("tokens",))
    assert what == "failed: with one tensor as x and residual: residual_out shares memory with residual"


def test_an_input_that_is_altered_only_when_it_is_shared_is_caught() -> None:
    def doubles(a: Args) -> Any:
        if a.x.data_ptr() == a.residual.data_ptr():
            a.x.mul_(2)
        return ADD(a)

    what = said("add_rms_norm", doubles, "alias", samples=("tokens",))
    assert what == "failed: with one tensor as x and residual: changed its input x, residual"


def test_arguments_in_one_buffer_are_tensors_of_their_own() -> None:
    how: dict[str, Any] = {"samples": ("heads-interleaved",)}
    assert caught_by("rope", by_storage, **how) == {"alias"}
    assert said("rope", by_storage, "alias", **how).startswith("failed: with all arguments in one buffer: y: ")


def test_what_is_written_may_be_no_other_argument() -> None:
    refused = {c.op for c in cases() if c.bad is not None and c.bad.id.endswith("-overlaps")}
    assert refused == {"mla_cache_write", "index_cache_write", "mla_prolog", "indexer_prolog"}
