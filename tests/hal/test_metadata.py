"""What is checked of a call without reading values: each error names the argument, the value and the fix."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from torch import Tensor
from toys import CROWD, PAIR, WRITE, raised, spec_of

from glm5_hal.errors import HalError
from glm5_hal.metadata import axis_names, bind_axes, bind_dtypes, evaluate, out_shapes, signature_of
from glm5_hal.ops import specs
from glm5_hal.signature import TensorMeta
from glm5_hal.spec import Arg, Constraint, Out, Scalar


def metas(**changes: Any) -> dict[str, TensorMeta | None]:
    base = {n: TensorMeta("float32", (2, 3), "cpu", (3, 1)) for n in "abc"}
    return {**base, "d": TensorMeta("int32", (2,), "cpu", (1,)), "e": None, **changes}


def scalars(**changes: Any) -> dict[str, Any]:
    return {"k": 1, "scale": 1.0, "mode": "plain", "flag": False, **changes}


def refused(values: dict[str, Any] | None = None, **tensors: Any) -> HalError:
    return raised(signature_of, CROWD, metas(**tensors), scalars(**values or {}))


# Dims


@pytest.mark.parametrize(
    ("dim", "value"),
    [
        ("T", 5),
        ("7", 7),
        ("T+1", 6),
        ("2*I", 6),
        ("T-I", 2),
        ("T//2", 2),
        ("H*(K+2*I)", 44),
        ("T-I-1", 1),
        ("2*T//3", 3),
    ],
)
def test_a_dim_is_arithmetic_on_axes(dim: str, value: int) -> None:
    assert evaluate(dim, {"T": 5, "I": 3, "H": 4, "K": 5}) == value


@pytest.mark.parametrize("dim", ["T/2", "T**2", "-T", "max(T,1)", "T if T else 1", "T[0]"])
def test_a_dim_is_nothing_else(dim: str) -> None:
    assert raised(evaluate, dim, {"T": 5}).code == "CONTRACT"


def two(x: Tensor, y: Tensor | None = None, *, n: int = 2) -> Tensor:
    return x


def with_dims(x: str, y: str) -> Any:
    return spec_of(
        "toy_dims", two, (Arg("x", x, "F", ""), Arg("y", y, "F", "", optional=True)), scalars=(Scalar("n", ""),)
    )


@pytest.mark.parametrize(
    ("dims", "shapes", "axes"),
    [
        (("T D", "T D"), ((2, 3), (2, 3)), {"T": 2, "D": 3}),
        (("T D", "D T+1"), ((2, 3), (3, 3)), {"T": 2, "D": 3}),
        (("T D", "n D"), ((2, 3), (2, 3)), {"T": 2, "D": 3}),
        (("T D", "T D"), ((2, 3), None), {"T": 2, "D": 3}),
        (("... D", "... 2*D"), ((4, 5, 3), (4, 5, 6)), {"...": (4, 5), "D": 3}),
        (("... D", "D"), ((3,), (3,)), {"...": (), "D": 3}),
        (("T ... D", "T D"), ((2, 8, 9, 3), (2, 3)), {"T": 2, "...": (8, 9), "D": 3}),
        (("", "T"), ((), (4,)), {"T": 4}),
        (("T D", "T 128"), ((2, 3), (2, 128)), {"T": 2, "D": 3}),
    ],
)
def test_axes_are_bound_in_the_order_of_declaration(dims: Any, shapes: Any, axes: dict[str, Any]) -> None:
    found = bind_axes(with_dims(*dims), dict(zip("xy", shapes, strict=True)), {"n": 2})
    assert found == {"n": 2, **axes}


@pytest.mark.parametrize(
    ("dims", "shapes", "words"),
    [
        (("T D", "T D"), ((2, 3), (2, 4)), "y has shape (2, 4); it is [T, D] and D should be 3"),
        (("T D", "D T+1"), ((2, 3), (3, 4)), "T+1 should be 3"),
        (("T D", "n D"), ((2, 3), (3, 3)), "n should be 2"),
        (("T D", "T D"), ((2, 3, 4), None), "x has shape (2, 3, 4); it is [T, D] and needs 2 dims"),
        (("... D", "... D"), ((4, 3), (5, 3)), "leading dims should be (4,)"),
        (("... H D", "D"), ((3,), (3,)), "needs at least 2 dims"),
        (("T D", "T 128"), ((2, 3), (2, 3)), "128 should be 128, not 3"),
    ],
)
def test_a_shape_that_disagrees_is_named_with_what_it_should_be(dims: Any, shapes: Any, words: str) -> None:
    problem = raised(bind_axes, with_dims(*dims), dict(zip("xy", shapes, strict=True)), {"n": 2})
    assert problem.code == "SHAPE"
    assert words in problem.what
    assert problem.value in shapes
    assert "pass " in problem.fix


def test_an_axis_that_is_used_before_it_is_bound_is_the_ops_fault() -> None:
    assert raised(bind_axes, with_dims("Q+1", "Q"), {"x": (2,), "y": (1,)}, {"n": 2}).code == "CONTRACT"


def test_only_integers_are_axes() -> None:
    found = bind_axes(CROWD, dict.fromkeys(CROWD.tensors), scalars(k=3))
    assert found == {"k": 3}


def test_the_axes_that_a_declaration_names() -> None:
    assert axis_names(with_dims("... D", "H*(D+2*I) 128")) == {"D", "H", "I"}


# Dtypes


def test_one_variable_is_one_dtype_throughout_a_call() -> None:
    problem = refused(b=TensorMeta("float16", (2, 3)))
    assert problem.code == "DTYPE"
    assert problem.what == "toy_crowd: b is float16, it should be float32"
    assert problem.value == "float16"
    assert problem.fix == "convert with b.to(torch.float32)"
    assert bind_dtypes(CROWD, {"a": "float16", "b": "float16", "c": "float64", "d": "int32", "e": None}) == {
        "F": "float16",
        "G": "float64",
        "acc": "float32",
    }


def test_a_fixed_dtype() -> None:
    problem = refused(d=TensorMeta("int64", (2,)))
    assert (problem.code, problem.what) == ("DTYPE", "toy_crowd: d is int64, it should be int32")


def test_what_is_accumulated_is_float64_only_where_the_activations_are() -> None:
    kinds = {"a": "float64", "b": "float64", "c": "float32", "d": "int32", "e": None}
    assert bind_dtypes(CROWD, kinds)["acc"] == "float64"


# Scalars


@pytest.mark.parametrize(
    ("name", "value", "code", "words"),
    [
        ("k", True, "TYPE", "k is True, it should be int"),
        ("k", 1.0, "TYPE", "k is 1.0, it should be int"),
        ("k", None, "TYPE", "k is None, it should be int"),
        ("k", "1", "TYPE", "k is '1', it should be int"),
        ("k", 0, "SCALAR", "k is 0, it should be >= 1 and <= 4096"),
        ("k", 4097, "SCALAR", "k is 4097, it should be >= 1 and <= 4096"),
        ("scale", "x", "TYPE", "scale is 'x', it should be float"),
        ("scale", False, "TYPE", "scale is False, it should be float"),
        ("scale", -0.5, "SCALAR", "scale is -0.5, it should be >= 0.0"),
        ("scale", math.nan, "SCALAR", "scale is nan, it should be finite"),
        ("scale", math.inf, "SCALAR", "scale is inf, it should be finite in float32"),
        ("scale", 1e39, "SCALAR", "scale is 1e+39, it should be finite in float32"),
        ("scale", 10**400, "SCALAR", "it should be an integer of 32 bits"),
        pytest.param("scale", 10**5000, "SCALAR", "scale is a value of type int, it should be an", id="many digits"),
        ("k", 2**31, "SCALAR", "k is 2147483648, it should be an integer of 32 bits"),
        ("k", [1] * 10_000, "TYPE", "1, 1..., it should be int"),
        ("mode", "odd", "SCALAR", "mode is 'odd', it should be one of 'plain', 'fancy'"),
        ("mode", 1, "TYPE", "mode is 1, it should be str"),
        ("flag", 1, "TYPE", "flag is 1, it should be bool"),
    ],
)
def test_a_scalar_of_another_type_or_outside_its_range(name: str, value: Any, code: str, words: str) -> None:
    problem = refused({name: value})
    assert problem.code == code
    assert words in problem.what
    assert problem.fix == CROWD.options[name].doc
    assert problem.value is value


@pytest.mark.parametrize(("name", "value"), [("k", 1), ("k", 4096), ("scale", 2), ("scale", 3e38), ("flag", True)])
def test_bounds_are_inclusive_and_an_integer_is_a_float(name: str, value: Any) -> None:
    assert signature_of(CROWD, metas(), scalars(**{name: value})).scalars[name] is value


def optional_number(x: Tensor, *, cap: float | None = None) -> Tensor:
    return x


def test_none_is_a_value_where_the_annotation_says_so() -> None:
    spec = spec_of("toy_cap", optional_number, (Arg("x", "T D", "F", ""),), scalars=(Scalar("cap", "", low=0.5),))
    x = {"x": TensorMeta("float32", (2, 3))}
    assert signature_of(spec, x, {"cap": None}).scalars == {"cap": None}
    assert raised(signature_of, spec, x, {"cap": 0.25}).code == "SCALAR"
    assert "float or NoneType" in raised(signature_of, spec, x, {"cap": True}).what


# Constraints, devices, layouts


@pytest.mark.parametrize("code", ["SHAPE", "DTYPE"])
def test_a_constraint_sees_axes_scalars_and_dtypes(code: str) -> None:
    seen: dict[str, Any] = {}

    def test(known: Any) -> bool:
        seen.update(known)
        return False

    spec = dataclasses.replace(CROWD, constraints=(Constraint("T is odd", test, "drop one", code),))
    problem = raised(signature_of, spec, metas(), scalars())
    assert seen == {
        **scalars(), "T": 2, "D": 3, "k": 1, "dtypes": {"a": "float32", "b": "float32", "c": "float32", "d": "int32"}
    }  # fmt: skip
    assert (problem.code, problem.fix) == (code, "drop one")
    assert "toy_crowd: T is odd: not so for " in problem.what
    assert ("T=2" if code == "SHAPE" else "a=float32") in problem.what


def test_all_tensors_are_on_one_device() -> None:
    problem = refused(c=TensorMeta("float32", (2, 3), "elsewhere:1"))
    assert problem.code == "DEVICE"
    assert problem.what == "toy_crowd: c is on elsewhere:1 and a on cpu"
    assert "nothing is ever copied" in problem.fix
    assert refused(c=TensorMeta("float32", (2, 3), "cpu:1")).code == "DEVICE", "an index is part of a device"


def test_a_layout_that_the_op_refuses() -> None:
    good = {"x": TensorMeta("float32", (2, 3), strides=(1, 2)), "cache": TensorMeta("float32", (2, 3), strides=(3, 1))}
    assert signature_of(WRITE, good, {}).axes == {"T": 2, "D": 3}
    problem = raised(signature_of, WRITE, {**good, "cache": good["x"]}, {})
    assert problem.code == "STRIDE"
    assert problem.what == "toy_write: cache must be contiguous, its strides are (1, 2) for shape (2, 3)"
    assert problem.value == (1, 2)


def test_a_page_is_contiguous_within() -> None:
    spec = dataclasses.replace(WRITE, args=(WRITE.args[0], dataclasses.replace(WRITE.args[1], layout="page")))
    x = TensorMeta("float32", (2, 3))
    gap, inner = TensorMeta("float32", (2, 3), strides=(8, 1)), TensorMeta("float32", (2, 3), strides=(6, 2))
    assert signature_of(spec, {"x": x, "cache": gap}, {}).tensors["cache"] == gap
    assert "contiguous within each page" in raised(signature_of, spec, {"x": x, "cache": inner}, {}).what


@pytest.mark.parametrize("strides", [(0, 1), (2, 1), (1, 1)])
def test_what_is_written_is_no_element_under_two_names(strides: tuple[int, int]) -> None:
    spec = dataclasses.replace(WRITE, args=(WRITE.args[0], dataclasses.replace(WRITE.args[1], layout="any")))
    folded, whole = TensorMeta("float32", (2, 3), strides=strides), TensorMeta("float32", (2, 3), strides=(3, 1))
    assert signature_of(spec, {"x": folded, "cache": whole}, {}).axes == {"T": 2, "D": 3}, "reading does no harm"
    problem = raised(signature_of, spec, {"x": whole, "cache": folded}, {})
    assert (problem.code, problem.value) == ("STRIDE", strides)
    assert "elements of it share memory" in problem.what


def test_the_signature_holds_what_the_requirements_read() -> None:
    found = signature_of(CROWD, metas(), scalars(k=7))
    assert (found.op, found.tensors, found.scalars) == ("toy_crowd", metas(), scalars(k=7))
    assert found.axes == {"T": 2, "D": 3, "k": 7}


# Outputs


def test_shapes_and_dtypes_of_outputs_follow() -> None:
    outs = (Out("y", "... 2*D", "F", ""), Out("lse", "n", "acc", ""), Out("i", "", "int32", ""))
    spec = dataclasses.replace(
        with_dims("... D", "D"), outs=outs, accuracy={o.name: next(iter(PAIR.accuracy.values())) for o in outs}
    )
    axes = bind_axes(spec, {"x": (4, 5, 3), "y": None}, {"n": 9})
    assert out_shapes(spec, axes, {"F": "bfloat16", "acc": "float32"}) == [
        ((4, 5, 6), "bfloat16"),
        ((9,), "float32"),
        ((), "int32"),
    ]


@pytest.mark.parametrize("spec", specs().values(), ids=list(specs()))
def test_every_dim_of_the_catalogue_is_arithmetic_on_axes_that_are_bound_by_then(spec: Any) -> None:
    for item in (*spec.args, *spec.outs):
        for dim in item.dims.split():
            if dim != "...":
                evaluate(dim, {**dict.fromkeys(axis_names(spec), 1), **dict.fromkeys(spec.options, 1)})
