"""Capability as data: each requirement says yes, or no with code, detail, fix, and the fix in a form to apply."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from toys import raised

from glm5_hal.capability import (
    ACCEPTED,
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
    package_problem,
    when,
)
from glm5_hal.signature import Facts, Signature, TensorMeta

NOBODY = Facts()


def call(**changes: Any) -> Signature:
    base: dict[str, Any] = {
        "op": "toy",
        "tensors": {"q": TensorMeta("float32", (4, 6), strides=(6, 1)), "mask": None},
        "scalars": {"top_k": 64, "mode": "plain", "cap": None},
        "axes": {"T": 4, "D": 6, "top_k": 64},
    }
    return Signature(**{**base, **changes})


# requirement, a call that it takes, a call that it does not, code, words of the detail, the patch
TABLE: dict[str, tuple[Requirement, Signature, Signature, str, str, tuple[tuple[str, Any], ...]]] = {
    "dtype": (
        dtype("q", "bfloat16", "float32"),
        call(),
        call(tensors={"q": TensorMeta("float16", (4, 6))}),
        "DTYPE",
        "q is float16, this kernel takes bfloat16 or float32",
        (("q.dtype", "bfloat16"),),
    ),
    "limit": (limit("top_k", 64), call(), call(axes={"top_k": 65}), "LIMIT", "<= 64, got 65", (("top_k", 64),)),
    "at_least": (at_least("T", 4), call(), call(axes={"T": 3}), "MINIMUM", ">= 4, got 3", (("T", 4),)),
    "multiple_of": (
        multiple_of("D", 3),
        call(),
        call(axes={"D": 100}),
        "MULTIPLE",
        "multiple of 3, got 100",
        (("D", 99),),
    ),
    "one_of": (
        one_of("mode", "plain", "fancy"),
        call(),
        call(scalars={"mode": "odd"}),
        "CHOICE",
        "one of 'plain', 'fancy', got 'odd'",
        (("mode", "plain"),),
    ),
    "contiguous": (
        contiguous("q"),
        call(),
        call(tensors={"q": TensorMeta("float32", (4, 6), strides=(1, 4))}),
        "STRIDE",
        "its strides are (1, 4) for shape (4, 6)",
        (("q.strides", None),),
    ),
    "absent": (
        absent("mask"),
        call(),
        call(tensors={"mask": TensorMeta("bool", (4,))}),
        "UNSUPPORTED_ARG",
        "does not take mask",
        (("mask", None),),
    ),
    "when": (
        when(lambda c: c.value("T") % 2 == 0, "T must be even", "pad the batch", reads=(("T", "value"),)),
        call(),
        call(axes={"T": 5}),
        "CONDITION",
        "T must be even",
        (),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_it_takes_what_it_says(name: str) -> None:
    requirement, good, *_ = TABLE[name]
    assert requirement.test(good, NOBODY) is ACCEPTED
    assert str(ACCEPTED) == "accepted"


@pytest.mark.parametrize("name", TABLE)
def test_a_no_is_typed_and_says_what_to_do(name: str) -> None:
    requirement, _, bad, code, words, patch = TABLE[name]
    no = requirement.test(bad, NOBODY)
    assert isinstance(no, Rejected)
    assert (no.code, no.patch) == (code, patch)
    assert words in no.detail
    assert no.fix
    assert str(no) == f"rejected  {code}  {no.detail}  -> {no.fix}"


@pytest.mark.parametrize("name", TABLE)
def test_it_describes_itself_and_is_a_requirement(name: str) -> None:
    requirement = TABLE[name][0]
    assert isinstance(requirement, Requirement)
    assert requirement.describe()
    assert requirement.reads


@pytest.mark.parametrize("name", TABLE)
def test_the_answer_depends_on_nothing_but_what_it_reads(name: str) -> None:
    """Everything else may change: the table of the dispatcher keeps apart what is read, and no more."""
    requirement, good, bad, *_ = TABLE[name]
    for subject in (good, bad):
        changed = subject
        for tensor, meta in subject.tensors.items():
            if meta is None:
                continue
            others: dict[str, Any] = {"dtype": "int8", "shape": (9, 9), "strides": (1, 9), "device": "elsewhere"}
            read = {what for read_name, what in requirement.reads if read_name == tensor}
            loose = {k: v for k, v in others.items() if k not in read}
            changed = dataclasses.replace(
                changed, tensors={**changed.tensors, tensor: dataclasses.replace(meta, **loose)}
            )
        numbers = {n: v for n, v in {**subject.axes}.items() if (n, "value") in requirement.reads}
        changed = dataclasses.replace(changed, axes={**dict.fromkeys(subject.axes, 7777), **numbers})
        assert type(requirement.test(changed, NOBODY)) is type(requirement.test(subject, NOBODY))


@pytest.mark.parametrize(
    ("got", "factor", "new"), [(1, 64, 64), (0, 64, 64), (95, 64, 64), (97, 64, 128), (160, 64, 128), (161, 64, 192)]
)
def test_the_fix_of_multiple_of_is_a_positive_multiple_near_by(got: int, factor: int, new: int) -> None:
    no = multiple_of("D", factor).test(call(axes={"D": got}), NOBODY)
    assert isinstance(no, Rejected)
    assert no.patch == (("D", new),)


ABSENT = [
    dtype("mask", "bool"),
    contiguous("mask"),
    limit("M", 3),
    at_least("M", 3),
    multiple_of("M", 3),
    one_of("M", 3),
]


@pytest.mark.parametrize("requirement", ABSENT, ids=lambda r: r.describe())
def test_what_was_not_given_limits_nothing(requirement: Requirement) -> None:
    """M stands for an axis that only an optional tensor has."""
    assert requirement.test(call(), NOBODY) is ACCEPTED


def test_an_optional_number_that_is_none_is_within_every_bound_but_is_a_choice_of_its_own() -> None:
    assert limit("cap", 3).test(call(), NOBODY) is ACCEPTED
    assert one_of("cap", None, 2).test(call(), NOBODY) is ACCEPTED
    assert isinstance(one_of("cap", 1, 2).test(call(), NOBODY), Rejected)


@pytest.mark.parametrize(
    ("requirement", "good", "code", "fix"),
    [
        (arch("a1", "a2"), Facts(arch="a2"), "ARCH", "run it on a1 or a2"),
        (feature("fp8", "use firmware 7"), Facts(features=frozenset({"fp8"})), "FEATURE", "use firmware 7"),
        (
            package("acme-sdk", ">=2.9"),
            Facts(versions={"acme-sdk": "2.10"}),
            "PACKAGE",
            "pip install 'acme-sdk>=2.9'",
        ),
    ],
)
def test_facts_of_the_machine(requirement: Requirement, good: Facts, code: str, fix: str) -> None:
    assert requirement.test(call(), good) is ACCEPTED
    no = requirement.test(call(), NOBODY)
    assert isinstance(no, Rejected)
    assert (no.code, no.fix, no.patch) == (code, fix, ())
    assert no.detail
    assert requirement.reads == frozenset()
    assert requirement.describe()


@pytest.mark.parametrize(
    ("versions", "known", "words"),
    [
        (">=2.9", {"acme-sdk": "2.9"}, None),
        (">=2.9", {"acme-sdk": "2.10.0+vendor.3"}, None),
        (">=2.9,<3", {"acme-sdk": "3.0"}, "3.0 is installed"),
        (">=2.9", {"acme-sdk": "2.8.1"}, "2.8.1 is installed"),
        (">=2.9", {"acme-sdk": "2.10rc1"}, None),  # vendors ship release candidates
        (">=2.9", {"acme-sdk": "master"}, "'master', cannot be read"),
        (">=2.9", {}, "is not installed"),
    ],
)
def test_versions_are_compared_as_pep_440_has_them(versions: str, known: dict[str, str], words: str | None) -> None:
    problem = package_problem("acme-sdk", versions, known)
    assert problem is None if words is None else words in str(problem)


@pytest.mark.parametrize(
    "made",
    [
        lambda: dtype("q"),
        lambda: one_of("mode"),
        lambda: arch(),
        lambda: multiple_of("D", 0),
        lambda: feature("fp8", " "),
        lambda: package("acme-sdk", "2.9"),
        lambda: when(lambda c: True, "", "fix", reads=()),
        lambda: when(lambda c: True, "reason", "", reads=()),
    ],
)
def test_a_requirement_that_could_not_give_a_useful_no_cannot_be_made(made: Any) -> None:
    problem = raised(made)
    assert problem.code == "CONTRACT"
    assert problem.fix


@pytest.mark.parametrize(
    ("shape", "strides", "below", "answer"),
    [
        ((4, 6), (6, 1), 0, True),
        ((4, 6), (12, 1), 0, False),  # a gap after every row
        ((4, 6), (12, 1), 1, True),  # which does not matter within one
        ((4, 6), (1, 4), 0, False),
        ((1, 6), (99, 1), 0, True),  # a dim of one has no stride
        ((4, 1, 6), (6, 77, 1), 0, True),
        ((0, 6), (1, 1), 0, True),
        ((4, 6), None, 0, True),
        ((), (), 0, True),
    ],
)
def test_contiguous_is_row_major_without_gaps(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, below: int, answer: bool
) -> None:
    meta = TensorMeta("float32", shape, strides=strides)
    assert meta.contiguous_below(below) is answer
    assert meta.contiguous is meta.contiguous_below(0)


def test_a_value_is_an_axis_or_a_scalar() -> None:
    assert (call().value("T"), call().value("mode"), call().value("nothing")) == (4, "plain", None)


def test_accepted_is_one_value() -> None:
    assert Accepted() == ACCEPTED
