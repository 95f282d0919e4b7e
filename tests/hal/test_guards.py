"""Guards and tables: whatever was called before, a kernel is given just the calls that it was resolved for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import CROWD, PAIR, installed, published, stand_in, toy

import glm5_hal
from glm5_hal import context, guards
from glm5_hal.backend import Device, Kernel
from glm5_hal.capability import ACCEPTED, Decision
from glm5_hal.catalogue import Catalogue
from glm5_hal.dispatch import GUARD_FROM
from glm5_hal.errors import HalError
from glm5_hal.guards import tensor_guard
from glm5_hal.signature import Facts, Signature
from glm5_hal.spec import OpSpec


class Subclass(torch.Tensor):
    """A tensor class of someone else."""


# The guard itself


def tensors(**changes: Any) -> list[torch.Tensor]:
    made = {"a": torch.ones(4, 4), "b": torch.ones(4, 4), "c": torch.ones(2)}
    return list({**made, **changes}.values())


OTHERS: dict[str, Any] = {
    "a dtype": torch.ones(4, 4, dtype=torch.float16),
    "a shape": torch.ones(4, 5),
    "a rank": torch.ones(4, 4, 1),
    "strides": torch.ones(4, 4).t(),
    "a gap": torch.ones(8, 4)[::2],
    "a device": torch.ones(4, 4, device="meta"),
    "a parameter": torch.nn.Parameter(torch.ones(4, 4), requires_grad=False),
    "a subclass": torch.ones(4, 4).as_subclass(Subclass),
    "a gradient": torch.ones(4, 4).requires_grad_(),
    "a sparse tensor": torch.ones(4, 4).to_sparse(),
    "a lazy negative": torch._neg_view(torch.ones(4, 4)),
    "a list": [[1.0] * 4] * 4,
}


def test_a_guard_knows_tensors_that_look_the_same() -> None:
    guard = tensor_guard(tensors())
    assert guard is not None
    assert guard(*tensors())
    assert guard(*tensors(a=torch.zeros(9, 4)[5:])), "an offset is not read by anyone"


@pytest.mark.parametrize("what", OTHERS)
def test_a_guard_tells_apart(what: str) -> None:
    guard = tensor_guard(tensors())
    assert guard is not None
    for name in "ab":
        assert not guard(*tensors(**{name: OTHERS[what]}))


def test_a_guard_made_without_gradients_says_no_where_they_are_asked_for() -> None:
    asking = tensors(b=torch.nn.Parameter(torch.ones(4, 4)))
    with torch.no_grad():
        guard = tensor_guard(asking)
        assert guard is not None
        assert guard(*asking)
    assert not guard(*asking)


def test_a_guard_allocates_nothing() -> None:
    """A cache may fill the device: a guard that is tried on a tensor of its size would not fit beside it."""
    huge = [torch.empty(1).expand(1 << 20, 1 << 20) for _ in range(2)]
    assert tensor_guard(huge) is not None


def test_a_guard_says_no_to_one_tensor_given_twice() -> None:
    """Torch's own rule; such calls are left to the table."""
    guard = tensor_guard(tensors())
    assert guard is not None
    a, _, c = tensors()
    assert not guard(a, a, c)


def test_without_torchs_guards_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._C._dynamo.guards as theirs

    class Changed:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise TypeError("another signature")

    monkeypatch.setattr(theirs, "TensorGuards", Changed)
    assert tensor_guard(tensors()) is None


@pytest.mark.parametrize("answer", [True, False])
def test_a_guard_that_knows_everything_or_nothing_is_not_used(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    import torch._C._dynamo.guards as theirs

    class Odd:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def check(self, *args: Any) -> bool:
            return answer

    monkeypatch.setattr(theirs, "TensorGuards", Odd)
    assert tensor_guard(tensors()) is None


# Table and guard, against every history


class Witness(Catalogue):
    """Each resolution gets a kernel of its own, which demands that it is given that very call, then and later."""

    def __init__(self) -> None:
        super().__init__((stand_in("acme"), stand_in("other")))
        self.ran = 0

    def device(self, name: str) -> Device:
        return Device("cpu", name, "toy1")

    def kernels(self, name: str, op: str) -> tuple[Kernel, ...]:
        spec = {"toy_pair": PAIR, "toy_crowd": CROWD}[op]
        resolved: list[tuple[Any, ...]] = []
        witness = self

        class Reads:
            reads = frozenset({(n, "strides") for n in spec.tensors})

            def test(self, call: Signature, facts: Facts) -> Decision:
                resolved[:] = [(call.tensors, {n: (v, type(v)) for n, v in call.scalars.items()}, *effective(spec))]
                return ACCEPTED

            def describe(self) -> str:
                return "everything"

        def fn(*args: Any, **kwargs: Any) -> str:
            arguments = spec.bind(*args, **kwargs)
            given = toy(spec).describe(**arguments)
            now = (given.tensors, {n: (arguments[n], type(arguments[n])) for n in spec.options}, *effective(spec))
            assert now == resolved[0]
            asks = [t.requires_grad for t in arguments.values() if isinstance(t, torch.Tensor)]
            assert not (torch.is_grad_enabled() and any(asks))
            assert not any(type(t).__name__ == "FakeTensor" for t in arguments.values())
            witness.ran += 1
            return name

        fn.__signature__ = spec.signature  # type: ignore[attr-defined]
        return (Kernel(op, "native", fn, (Reads(),)),)


def effective(spec: OpSpec) -> tuple[Any, ...]:
    guarded = sum(not a.optional for a in spec.args) >= GUARD_FROM
    return (*context.effective(), torch.is_inference_mode_enabled() if guarded else None)


def floats() -> Iterator[torch.Tensor]:
    for kind in (torch.float32, torch.bfloat16):
        for shape in ((2, 3), (3, 2)):
            plain = torch.ones(*shape, dtype=kind)
            yield plain
            yield torch.nn.Parameter(plain.clone(), requires_grad=False)
            yield plain.as_subclass(Subclass)
            yield plain.clone().requires_grad_()
            yield torch.ones(*shape[::-1], dtype=kind).t()
            yield torch.ones(shape[0] * 2, shape[1], dtype=kind)[::2]
            yield plain.to("meta")
    with torch.inference_mode():
        yield torch.ones(2, 3)
    yield torch.ones(2, 3, dtype=torch.int64)


#: Tensors for each argument, as the guard knows no call that has one of them twice.
FLOATS = {name: list(floats()) for name in "abcexy"}
INTS = [torch.ones(2, dtype=torch.int32), torch.ones(3, dtype=torch.int32), torch.ones(4, dtype=torch.int32)[::2]]
MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
POLICIES: list[dict[str, Any]] = [
    {},
    {"policy": "acme"},
    {"policy": "other"},
    {"policy": "acme,other"},
    {"require": "sorted_indices"},
    {"check": "metadata"},
]


@dataclass(frozen=True)
class Call:
    """One call, in its surroundings."""

    op: str
    args: dict[str, Any]
    mode: str
    policy: dict[str, Any]

    def outcome(self) -> str:
        """What happens: the kernel's own answer, or an error's code."""
        op = toy({"toy_pair": PAIR, "toy_crowd": CROWD}[self.op])
        with ExitStack() as stack:
            stack.enter_context(MODES[self.mode]())
            if self.policy:
                stack.enter_context(glm5_hal.use(**self.policy))
            try:
                return str(op(**self.args))
            except HalError as problem:
                return problem.code if problem.code != "KERNEL" else f"KERNEL {problem.value!r}"


scalars = {
    "k": st.sampled_from([1, 1, 1, 2, True, 1.0, 0]),
    "mode": st.sampled_from(["plain", "plain", "fancy", "odd"]),
    "flag": st.sampled_from([False, False, True, 0]),
}


def some(name: str) -> st.SearchStrategy[torch.Tensor]:
    """Mostly the same, or nothing would ever be a hit."""
    return st.sampled_from(FLOATS[name][:1] * 40 + FLOATS[name])


crowds = st.fixed_dictionaries(
    {**{n: some(n) for n in "abc"}, "d": st.sampled_from(INTS[:1] * 6 + INTS), **scalars,
     "e": st.sampled_from([None] * 30 + FLOATS["e"][:8]), "scale": st.sampled_from([1.0, 1.0, 1, 2.0, True])}
)  # fmt: skip
pairs = st.fixed_dictionaries({"x": some("x"), "y": st.sampled_from([None] * 10 + FLOATS["y"]), **scalars})
calls = st.builds(
    lambda args, mode, policy: Call("toy_crowd" if "a" in args else "toy_pair", args, mode, policy),
    st.one_of(crowds, crowds, pairs),
    st.sampled_from([*MODES]),
    st.sampled_from([{}] * 4 + POLICIES),
)


def alone(call: Call) -> str:
    """The outcome with nothing before it."""
    context._process.catalogue.__init__()  # type: ignore[misc]
    toy(PAIR).clear()
    toy(CROWD).clear()
    return call.outcome()


@settings(max_examples=150, deadline=None)
@given(history=st.lists(calls, min_size=2, max_size=12), again=st.lists(st.integers(0, 11), max_size=12))
def test_the_outcome_of_a_call_does_not_depend_on_the_calls_before_it(
    history: Sequence[Call], again: list[int]
) -> None:
    """Every kernel asserts that it is given what it was resolved for; a failed assertion is a KERNEL outcome."""
    sequence = [*history, *(history[i % len(history)] for i in again)]
    with published(), installed():
        context._process.catalogue = Witness()
        expected = {id(call): alone(call) for call in history}
        toy(PAIR).clear()
        toy(CROWD).clear()
        for call in sequence:
            assert call.outcome() == expected[id(call)]
            assert not expected[id(call)].startswith("KERNEL")


def test_the_property_above_meets_hits_of_the_guard() -> None:
    """Or it would prove little: equal calls in a row are served by the guard, without a look at the table."""
    args = {n: FLOATS[n][0] for n in "abc"} | {"d": INTS[0]}
    crowd = toy(CROWD)
    with published(), installed():
        context._process.catalogue = witness = Witness()
        crowd(**args)
        crowd(**args)
        crowd._table.clear()
        crowd(**args)
        assert crowd._table == {}, "no miss"
        assert witness.ran == 3
        with torch.no_grad():
            crowd(**{**args, "a": FLOATS["a"][3]})
            assert len(crowd._table) == 1, "a tensor that requires a gradient is another"


def test_without_guards_the_table_serves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from glm5_hal import dispatch

    monkeypatch.setattr(dispatch, "tensor_guard", lambda tensors: None)
    crowd = toy(CROWD)
    combinations = itertools.product(FLOATS["a"][:2], FLOATS["b"][:2], ({}, {"k": 2}))
    wanted = [{"a": a, "b": b, "c": FLOATS["c"][0], "d": INTS[0], **more} for a, b, more in combinations]
    with published(), installed(), torch.no_grad():
        context._process.catalogue = witness = Witness()
        for args in wanted * 3:
            crowd(**args)
        assert witness.ran == len(wanted) * 3


def test_the_module_says_what_it_relies_on() -> None:
    assert "not public API" in (guards.__doc__ or "")
