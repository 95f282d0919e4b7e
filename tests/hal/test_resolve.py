"""Which kernel serves a call: policy order, strict naming, automatic order, and a reason for every no."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import CROWD, PAIR, PIPE, call_of, installed, kernel_of, published, stand_in

from glm5_hal.backend import Kernel, Unavailable
from glm5_hal.capability import (
    Accepted,
    Rejected,
    Requirement,
    absent,
    arch,
    at_least,
    contiguous,
    dtype,
    feature,
    limit,
    multiple_of,
    one_of,
    package,
    when,
)
from glm5_hal.explanation import described
from glm5_hal.metadata import axis_names, shape_of
from glm5_hal.ops import specs
from glm5_hal.ops._common.references import reference_of
from glm5_hal.plugins import PluginRecord
from glm5_hal.policy import parse
from glm5_hal.resolve import Resolution, resolve
from glm5_hal.signature import Facts, Signature, TensorMeta
from glm5_hal.spec import OpSpec

QUUX = call_of(PAIR, "quux:1")


def asked(
    policy: str,
    *records: PluginRecord,
    call: Signature = QUUX,
    spec: OpSpec = PAIR,
    require: frozenset[str] = frozenset(),
    exhaustive: bool = False,
) -> Resolution:
    with published(), installed(*records) as catalogue:
        targets = parse(policy, "test").targets(spec.name)
        return resolve(spec, call, catalogue, targets, require, exhaustive=exhaustive)


def chosen(policy: str, *records: PluginRecord, **more: Any) -> str | None:
    found = asked(policy, *records, **more).chosen
    return found.name if found else None


def quux(name: str = "quux", *kernels: Kernel, **fields: Any) -> PluginRecord:
    return stand_in(name, kernels or (kernel_of(PAIR),), device_type="quux", **fields)


def trace(found: Resolution) -> list[tuple[str, str]]:
    return [(s.candidate, s.decision.code if isinstance(s.decision, Rejected) else "yes") for s in found.trace]


def providers(*names: str, requires: Mapping[str, Requirement] = {}) -> tuple[Kernel, ...]:
    return tuple(kernel_of(PAIR, n, requires=[requires[n]] if n in requires else []) for n in names)


EVERYTHING = ("reference", "torch", "triton", "native")
NO = limit("D", 1)


# Automatic choice


def test_auto_takes_the_backend_of_the_tensors_device() -> None:
    here, there = quux(), stand_in("corge", [kernel_of(PAIR)], device_type="corge")
    assert chosen("auto", there, here) == "quux:native"
    assert chosen("auto", there, here, call=call_of(PAIR, "corge")) == "corge:native"
    assert asked("auto", there, here, call=call_of(PAIR, "grault")) == Resolution(None, ())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_auto_goes_native_then_triton_then_torch(count: int) -> None:
    order = ["native", "triton", "torch"]
    kernels = providers(*EVERYTHING, requires=dict.fromkeys(order[: count - 1], NO))
    found = asked("auto", quux("quux", *kernels))
    assert found.chosen is not None
    assert found.chosen.name == f"quux:{order[count - 1]}"
    assert trace(found) == [(f"quux:{p}", "LIMIT") for p in order[: count - 1]] + [(f"quux:{order[count - 1]}", "yes")]


def test_a_reference_is_never_chosen_unless_named() -> None:
    record = quux("quux", *providers("reference"))
    assert trace(asked("auto", record)) == [("quux", "NOT_IMPLEMENTED")]
    assert chosen("quux", record) is None
    assert chosen("quux:reference", record) == "quux:reference"


def test_an_outside_plugin_never_outranks_the_built_in_of_the_same_device_unless_named() -> None:
    outside = quux("aaa", *providers("native"), priority=100)
    builtin = quux("quux", *providers("torch"), builtin=True)
    from glm5_hal.plugins import order

    records = sorted([outside, builtin], key=order)
    assert chosen("auto", *records) == "quux:torch"
    assert chosen("aaa", *records) == "aaa:native"
    assert chosen("auto", *records, call=call_of(PAIR, "quux")) == "quux:torch"


def test_auto_goes_on_to_the_next_backend_of_the_device() -> None:
    first, second = quux("first", *providers("native", requires={"native": NO})), quux("second")
    assert trace(asked("auto", first, second)) == [("first:native", "LIMIT"), ("second:native", "yes")]


# Named choice


def test_naming_a_backend_is_strict() -> None:
    first, second = quux("first", *providers("native", requires={"native": NO})), quux("second")
    found = asked("first", first, second)
    assert found.chosen is None
    assert trace(found) == [("first:native", "LIMIT")]


def test_naming_a_provider_is_strict() -> None:
    record = quux("quux", *providers("native", "torch", requires={"torch": NO}))
    assert trace(asked("quux:torch", record)) == [("quux:torch", "LIMIT")]
    assert trace(asked("quux:triton", record)) == [("quux:triton", "NOT_IMPLEMENTED")]


def test_what_is_listed_is_tried_in_thatorder_and_marked_as_a_fallback() -> None:
    first, second = quux("first", *providers("native", requires={"native": NO})), quux("second")
    for policy in ("first,second", "first,auto"):
        found = asked(policy, first, second)
        assert found.chosen is not None
        assert (found.chosen.name, found.chosen.fallback) == ("second:native", True)
    found = asked("second,first", first, second)
    assert found.chosen is not None
    assert not found.chosen.fallback
    assert trace(found) == [("second:native", "yes")], "what comes later is not asked"


def test_a_backend_of_another_device_is_not_what_the_next_one_falls_back_from() -> None:
    """So that one policy, say "acme,cpu", may name the backend of either device."""
    elsewhere = stand_in("corge", [kernel_of(PAIR)], device_type="corge")
    no = quux("first", *providers("native", requires={"native": NO}))
    broken = PluginRecord("broken", "m", "d", "1", False, "broken", "IMPORT", "it raised", "mend it")
    missing = quux("missing", probe=lambda: Unavailable("no card", "plug it in"))
    for policy, fallback in (
        ("corge,second", False),
        ("auto,second", False),
        ("corge,first,second", True),
        ("corge,missing,second", True),
        ("broken,second", True),
    ):
        others = [elsewhere, broken, missing, no] if "auto" not in policy else [elsewhere]
        found = asked(policy, *others, quux("second"))
        assert found.chosen is not None
        assert (policy, found.chosen.name, found.chosen.fallback) == (policy, "second:native", fallback)


def test_every_candidate_answers_where_that_is_asked_for() -> None:
    first, second = quux("first", *providers("native", "torch", requires={"torch": NO})), quux("second")
    found = asked("first,second", first, second, exhaustive=True)
    assert trace(found) == [("first:native", "yes"), ("first:torch", "LIMIT"), ("second:native", "yes")]
    assert found.chosen is not None
    assert found.chosen.name == "first:native"


def test_an_op_may_have_a_rule_of_its_own() -> None:
    first, second = quux("first"), quux("second")
    assert chosen("first; toy_*=second", first, second) == "second:native"
    assert chosen("first; other=second", first, second) == "first:native"


# Composites


def test_a_composite_stands_in_where_there_is_no_kernel() -> None:
    call = call_of(PIPE, "quux")
    assert chosen("auto", quux(), call=call, spec=PIPE) == "quux:composite"
    assert chosen("quux:native", quux(), call=call, spec=PIPE) == "quux:composite"
    fused = quux("quux", kernel_of(PIPE, fn=lambda x, *, k=1: x))
    assert chosen("auto", fused, call=call, spec=PIPE) == "quux:native"


def test_a_reference_that_is_named_comes_before_the_composite() -> None:
    both = quux("quux", kernel_of(PIPE, "reference", fn=lambda x, *, k=1: x))
    call = call_of(PIPE, "quux")
    assert chosen("quux:reference", both, call=call, spec=PIPE) == "quux:reference"
    assert chosen("quux", both, call=call, spec=PIPE) == "quux:composite"


# Attributes


def test_a_kernel_must_claim_what_is_required() -> None:
    claims = [kernel_of(PAIR, "native"), kernel_of(PAIR, "torch", provides=["deterministic"])]
    found = asked("auto", quux("quux", *claims), require=frozenset({"deterministic"}))
    assert trace(found) == [("quux:native", "ATTRIBUTE"), ("quux:torch", "yes")]
    no = found.trace[0].decision
    assert isinstance(no, Rejected)
    assert no.detail == "does not claim deterministic"


def test_an_attribute_that_the_op_does_not_know_is_not_asked_of_it() -> None:
    assert "sorted_indices" not in PAIR.attributes
    assert chosen("auto", quux(), require=frozenset({"sorted_indices"})) == "quux:native"


# Every way to say no


def broken(name: str, code: str, reason: str, fix: str) -> PluginRecord:
    return PluginRecord(name, "m", "d", "1", False, "broken", code, reason, fix)


def raises() -> list[Kernel]:
    raise RuntimeError("no memory")


def answers(value: object) -> Requirement:
    @dataclasses.dataclass(frozen=True)
    class Odd:
        reads: frozenset[tuple[str, str]] = frozenset()

        def test(self, call: Signature, facts: Facts) -> Any:
            return value

        def describe(self) -> str:
            return "an odd one"

    return Odd()


def asks(requirement: Requirement) -> PluginRecord:
    return quux("quux", kernel_of(PAIR, requires=[requirement]))


WAYS: dict[str, tuple[PluginRecord, str, str]] = {
    "a plugin that is broken": (broken("quux", code="IMPORT", reason="no sdk", fix="install"), "PLUGIN", "no sdk"),
    "another device": (stand_in("quux", device_type="corge"), "DEVICE", "the tensors are on quux"),
    "no device": (
        quux(probe=lambda: Unavailable("no card", "plug it in")),
        "UNAVAILABLE",
        "no card",
    ),
    "a probe that raises": (quux(probe=lambda: 1 / 0), "UNAVAILABLE", "ZeroDivisionError"),
    "kernels() raises": (stand_in("quux", raises, device_type="quux"), "PLUGIN", "no memory"),
    "a kernel for no op": (
        stand_in("quux", [Kernel("nothing", "native", print)], device_type="quux"),
        "PLUGIN",
        "op that does not exist",
    ),
    "no kernel for the op": (quux("quux", kernel_of(CROWD)), "NOT_IMPLEMENTED", "no kernel for toy_pair"),
    "a dtype": (asks(dtype("x", "bfloat16")), "DTYPE", "bfloat16"),
    "a limit": (asks(limit("k", 0)), "LIMIT", "<= 0"),
    "a minimum": (asks(at_least("D", 64)), "MINIMUM", ">= 64"),
    "a multiple": (asks(multiple_of("D", 64)), "MULTIPLE", "multiple of 64"),
    "a choice": (asks(one_of("mode", "fancy")), "CHOICE", "'fancy'"),
    "an architecture": (asks(arch("z9")), "ARCH", "the device is toy1"),
    "a feature": (asks(feature("fp8", "buy it")), "FEATURE", "fp8"),
    "a package": (asks(package("no-such-dist", ">=1")), "PACKAGE", "not installed"),
    "a condition": (asks(when(lambda c: False, "never", "wait", reads=())), "CONDITION", "never"),
    "a condition that raises": (
        asks(when(lambda c: c.axes["nope"] > 0, "nope is there", "wait", reads=())),
        "CONTRACT",
        "KeyError: 'nope'",
    ),
    "an answer that is none": (asks(answers(False)), "CONTRACT", "answered False"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_no_has_a_code_a_detail_and_a_fix_and_nothing_else_is_used(way: str) -> None:
    record, code, words = WAYS[way]
    found = asked("quux", record)
    assert found.chosen is None
    (step,) = found.trace
    assert isinstance(step.decision, Rejected)
    assert step.decision.code == code
    assert words in step.decision.detail
    assert step.decision.fix
    assert step.candidate in ("quux", "quux:native")
    assert step.as_dict() == {
        "candidate": step.candidate,
        "accepted": False,
        "code": code,
        "detail": step.decision.detail,
        "fix": step.decision.fix,
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_no_of_one_does_not_keep_the_next_from_serving(way: str) -> None:
    other = quux("other")
    assert chosen("quux,other", WAYS[way][0], other) == "other:native"
    assert chosen("auto", WAYS[way][0], other) == "other:native"


def test_asking_changes_nothing() -> None:
    record = quux("quux", *providers("native", "torch", requires={"native": NO}))
    with published(), installed(record) as catalogue:
        targets = parse("auto", "test").targets("toy_pair")
        first = resolve(PAIR, QUUX, catalogue, targets)
        assert all(resolve(PAIR, QUUX, catalogue, targets) == first for _ in range(3))


def test_a_topk_that_is_too_large_for_one_kernel_goes_to_the_next_and_says_why() -> None:
    spec = specs()["topk_indices"]
    kernels = [
        Kernel("topk_indices", "native", spec.reference, (limit("top_k", 2048),)),
        Kernel("topk_indices", "torch", spec.reference),
    ]
    for k, name in ((2048, "quux:native"), (2049, "quux:torch"), (4096, "quux:torch")):
        call = described(spec, {"top_k": k, "device": "quux"})
        found = asked("auto", stand_in("quux", kernels, device_type="quux"), call=call, spec=spec)
        assert found.chosen is not None
        assert found.chosen.name == name
    no = found.trace[0].decision
    assert isinstance(no, Rejected)
    assert (no.code, no.detail) == ("LIMIT", "top_k must be <= 2048, got 4096")
    assert no.fix == "use top_k=2048, or another kernel"


# The fix, applied by a program


def applied(spec: OpSpec, call: Signature, patch: tuple[tuple[str, Any], ...]) -> Signature:
    """The call with a fix applied mechanically."""
    axes, scalars, tensors = dict(call.axes), dict(call.scalars), dict(call.tensors)
    for name, value in patch:
        head, _, part = name.partition(".")
        if part == "dtype":
            variable = spec.tensors[head].dtype
            for other in spec.args:
                meta = tensors[other.name]
                if meta is not None and (other.name == head or (other.dtype == variable and variable in spec.dtypes)):
                    tensors[other.name] = dataclasses.replace(meta, dtype=value)
        elif part == "strides":
            tensors[head] = dataclasses.replace(tensors[head], strides=value)  # type: ignore[type-var]
        elif name in tensors:
            tensors[name] = value
        else:
            assert name in axes or name in scalars, f"a fix of {name}, which the call does not have"
            if name in axes:
                axes[name] = value
            if name in scalars:
                scalars[name] = value
    for arg in spec.args:
        meta = tensors[arg.name]
        if meta is not None and axes != call.axes:
            tensors[arg.name] = dataclasses.replace(meta, shape=shape_of(arg.dims, axes))
    return Signature(call.op, tensors, scalars, axes)


def requirements(spec: OpSpec, call: Signature) -> st.SearchStrategy[Requirement]:
    """Any requirement that a kernel of this op could state."""
    tensors = st.sampled_from(list(spec.tensors))
    numbers = sorted({n for n in (*axis_names(spec), *call.axes) if n != "..."})
    small = st.integers(1, 300)
    kinds = [
        st.builds(dtype, tensors, st.sampled_from(["bfloat16", "float16", "float32", "int32", "uint8"])),
        st.builds(contiguous, tensors),
        st.builds(limit, st.sampled_from(numbers), small),
        st.builds(at_least, st.sampled_from(numbers), small),
        st.builds(multiple_of, st.sampled_from(numbers), small),
        st.builds(one_of, st.sampled_from(numbers), small, small),
        st.builds(arch, st.sampled_from(["toy1", "z9"])),
        st.builds(feature, st.just("fp8"), st.just("buy it")),
    ]
    optional = [a.name for a in spec.args if a.optional]
    if optional:
        kinds.append(st.builds(absent, st.sampled_from(optional)))
    if spec.options:
        kinds.append(st.builds(one_of, st.sampled_from(list(spec.options)), small, st.sampled_from(["plain", True])))
    return st.one_of(kinds)


OUTSIDE = {"ARCH", "FEATURE", "PACKAGE", "CONDITION"}


@settings(max_examples=12, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", specs())
def test_a_fix_that_is_applied_mechanically_gives_yes_or_the_next_no(name: str, data: st.DataObject) -> None:
    spec = specs()[name]
    call = described(spec, {"device": "quux"})
    strided = data.draw(st.sets(st.sampled_from(list(spec.tensors))))
    tensors = {
        n: dataclasses.replace(m, strides=tuple(range(90, 90 + len(m.shape)))) if m and n in strided else m
        for n, m in call.tensors.items()
    }
    call = dataclasses.replace(call, tensors=tensors)
    wanted = data.draw(st.lists(requirements(spec, call), min_size=1, max_size=4))
    record = stand_in("quux", [Kernel(name, "native", reference_of(name), tuple(wanted))], device_type="quux")
    with installed(record) as catalogue:
        (kernel, *_) = catalogue.kernels("quux", name)
        for _ in range(3):
            step = resolve(spec, call, catalogue, parse("quux:native", "t").targets(name), exhaustive=True).trace[0]
            if isinstance(step.decision, Accepted):
                return
            no = step.decision
            assert no.code
            assert no.detail
            assert no.fix
            assert bool(no.patch) is (no.code not in OUTSIDE)
            if not no.patch:
                return
            facts = Facts(arch="toy1")
            asking = next(r for r in kernel.requires if isinstance(r.test(call, facts), Rejected))
            call = applied(spec, call, no.patch)
            assert asking.test(call, facts) == Accepted(), f"{no.patch} does not satisfy {asking.describe()}"


def test_the_device_is_the_first_tensors() -> None:
    call = dataclasses.replace(QUUX, tensors={"y": None, "x": TensorMeta("float32", (2, 3), "corge:7")})
    corge = stand_in("corge", [kernel_of(PAIR)], device_type="corge")
    assert chosen("auto", quux(), corge, call=call) == "corge:native"
