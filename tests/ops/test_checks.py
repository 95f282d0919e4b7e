"""Checks of values: they name the element that is wrong, and take as many steps for many requests as for two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glm5_hal import ops
from glm5_hal.conformance.inputs import Draw
from glm5_hal.errors import HalError
from glm5_hal.ops import specs
from glm5_hal.ops._common import checks
from glm5_hal.spec import OpSpec, Sample

CACHED = [spec for spec in specs().values() if any(a.layout == "page" for a in spec.args)]


class Steps(TorchDispatchMode):
    """How many operations of torch ran."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def steps(call: Callable[[], Any]) -> int:
    with Steps() as seen:
        call()
    return seen.count


def refused(call: Callable[[], Any]) -> HalError:
    with pytest.raises(HalError) as found:
        call()
    return found.value


def int32(*rows: Any) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# --- pages -----------------------------------------------------------------------------------------------------------

CACHE = torch.zeros(5, 4, 1)  # 5 pages of 4 keys


def test_the_page_that_does_not_exist_is_named() -> None:
    table = int32([0, 1, 2], [3, 4, 5], [9, 9, 9])
    checks.paged("op", table, int32(12, 8, 0), CACHE)  # 5 and the nines are beyond what lengths reach
    problem = refused(lambda: checks.paged("op", table, int32(12, 9, 0), CACHE))
    assert (problem.code, problem.value) == ("VALUE", 5)
    assert "block_table[1, 2] is 5; it must be in [0, 5): the cache has 5 pages" in problem.what
    table[0, 1] = -1
    problem = refused(lambda: checks.paged("op", table, int32(5, 0, 0), CACHE))
    assert "block_table[0, 1] is -1" in problem.what


def test_a_wrong_value_is_not_looked_for_where_it_is_not_read() -> None:
    problem = refused(lambda: checks.paged("op", int32([0, 7], [7, 0]), int32(4, 4), CACHE))
    assert "block_table[1, 0] is 7" in problem.what


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
def test_requests_without_keys_need_no_pages(lengths: tuple[int, ...]) -> None:
    for width in (0, 2):
        checks.paged("op", torch.full((len(lengths), width), 9).int(), torch.tensor(lengths).int(), CACHE)


def test_lengths_must_fit_into_the_table() -> None:
    problem = refused(lambda: checks.paged("op", int32([0, 1]), int32(9), CACHE))
    assert "seq_lens[0] is 9; it must be in [0, 9)" in problem.what


# --- chosen keys -----------------------------------------------------------------------------------------------------


def test_the_index_outside_its_request_is_named() -> None:
    lens, cu = int32(3, 0, 7), int32(0, 2, 2, 4)
    good = int32([0, 2, -1], [-1, -1, -1], [6, -1, 5], [0, 1, 2])
    checks.chosen("op", good, lens, cu)
    for at, wrong, keys in (((0, 1), 3, 3), ((1, 2), -2, 3), ((2, 0), 7, 7), ((3, 2), 2**31 - 1, 7)):
        bad = good.clone()
        bad[at] = wrong
        problem = refused(lambda bad=bad: checks.chosen("op", bad, lens, cu))
        assert (problem.code, problem.value) == ("VALUE", wrong)
        expected = f"op: indices{list(at)} is {wrong}; it must be in [-1, {keys}): the request of token {at[0]} has"
        assert problem.what.startswith(expected)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_no_index_is_no_mistake(shape: tuple[int, int]) -> None:
    checks.chosen("op", torch.empty(shape, dtype=torch.int32), int32(5), int32(0, shape[0]))


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [s for s in CACHED if "seq_lens" in s.tensors], ids=lambda s: s.name)
def test_many_requests_take_no_more_steps_than_two(spec: OpSpec) -> None:
    axes = next(s for s in spec.samples() if s.id.startswith("decode")).axes

    def of(requests: int) -> int:
        sample = Sample("many", {**axes, "lens": ((1, 20),) * requests})
        args = spec.inputs(sample, "float32", Draw(0, "many")).args
        assert spec.check_values is not None
        return steps(lambda: spec.check_values(args))

    assert of(40) <= of(2)


# --- pages without room ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["auto", "metadata"])
@pytest.mark.parametrize("spec", CACHED, ids=lambda s: s.name)
def test_a_cache_whose_pages_hold_nothing_is_refused(spec: OpSpec, check: str) -> None:
    import glm5_hal

    args = dict(spec.inputs(next(iter(spec.samples())), "float32", Draw(0, "page")).args)
    for arg in spec.args:
        if arg.layout == "page" and args[arg.name] is not None:
            args[arg.name] = args[arg.name][:, :0]
    with glm5_hal.use(check=check):
        problem = refused(lambda: getattr(ops, spec.name)(**args))
    assert problem.code == "SHAPE"
    assert "page" in problem.what
    assert problem.fix
