"""A kernel that leaves its work to something else is caught; one that works for itself is not, whatever it calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from trying import caught_by, said

import glm5_hal
from glm5_hal import ops
from glm5_hal.backends import _torch
from glm5_hal.conformance import oracle, runner
from glm5_hal.conformance.cases import find
from glm5_hal.conformance.checks import provenance
from glm5_hal.conformance.intercept import operations
from glm5_hal.conformance.mutants import honest
from glm5_hal.conformance.mutants.honest import Args, kernel
from glm5_hal.conformance.mutants.stand_in import Made, installed, judge
from glm5_hal.conformance.subject import subject_of
from glm5_hal.conformance.target import targets
from glm5_hal.ops import specs
from glm5_hal.ops._common.references import REFERENCES

PLAIN = next(k.fn for k in _torch.kernels() if k.op == "rms_norm")
FROM = {"samples": ("tokens",)}


def of_reference(a: Args) -> Any:
    return REFERENCES.rms_norm(a.x, a.weight, eps=a.eps)


def of_shared_kernel(a: Args) -> Any:
    return PLAIN(a.x, a.weight, eps=a.eps)


def of_oracle(a: Args) -> Any:
    return oracle.truth(specs()["rms_norm"], vars(a)).outs["y"].to(a.x.dtype)


def of_another_ops_reference(a: Args) -> Any:
    return REFERENCES.add_rms_norm(a.x, torch.zeros_like(a.x), a.weight, eps=a.eps)[0]


@pytest.mark.parametrize(
    ("wrapper", "what"),
    [
        (of_reference, "runs glm5_hal's reference of rms_norm"),
        (of_shared_kernel, "runs cpu:torch, another kernel of rms_norm"),
        (of_oracle, "runs the suite's oracle"),
        (of_another_ops_reference, "runs glm5_hal's reference of add_rms_norm"),
    ],
)
def test_a_wrapper_is_caught_by_this_check_alone(wrapper: Callable[[Args], Any], what: str) -> None:
    assert caught_by("rms_norm", wrapper, **FROM) == {"provenance"}
    assert said("rms_norm", wrapper, "provenance", **FROM) == f"failed: {what}"


def test_an_op_that_enters_itself_again_is_caught() -> None:
    def again(a: Args) -> Any:
        if a.eps != 1e-5:
            return honest.rms_norm()(a)
        return glm5_hal.ops.rms_norm(a.x.clone(), a.weight, eps=a.eps + 1e-12)

    assert "the op that it is a kernel of" in said("rms_norm", again, "provenance", **FROM)


def test_through_torch_it_is_the_same_op() -> None:
    def again(a: Args) -> Any:
        if a.eps != 1e-5:
            return honest.rms_norm()(a)
        return torch.ops.glm5.rms_norm(a.x.clone(), a.weight, eps=a.eps + 1e-12)

    assert "the op that it is a kernel of" in said("rms_norm", again, "provenance", **FROM)


def test_another_providers_kernel_is_caught_and_one_of_its_own_is_not() -> None:
    inner = honest.rms_norm(honest.NORMS["in double"])

    def other(x: Any, weight: Any, *, eps: float) -> Any:
        return inner(Args(x=x, weight=weight, eps=eps))

    def native(x: Any, weight: Any, *, eps: float) -> Any:
        return other(x, weight, eps=eps)

    (case,) = find(["rms_norm[float32-tokens]"])
    with installed(Made("rms_norm", native), Made("rms_norm", other, provider="torch")):
        results = {r.backend: r for r in runner.run([case], targets("standin"), 0)}
    assert results["standin:native"].detail == "provenance: runs standin:torch, another kernel of rms_norm"
    assert results["standin:torch"].ok


def test_ops_that_are_not_its_own_are_the_kernels_business() -> None:
    def native(a: Args) -> Any:
        zero = torch.zeros_like(a.x)
        return ops.add_rms_norm(a.x, zero, a.weight, eps=a.eps)[0]

    parts = {"add_rms_norm": kernel("add_rms_norm", honest.add_rms_norm())}
    results = judge("rms_norm", kernel("rms_norm", native), parts=parts, dtypes=("float32",), samples=("tokens",))
    assert [r.verdict for r in results] == ["PASS"]


def test_the_same_code_in_another_file_is_another_kernel() -> None:
    from types import FunctionType

    right = next(k.fn for k in _torch.kernels() if k.op == "silu_and_mul")
    copy = FunctionType(right.__code__.replace(co_filename="vendor.py"), right.__globals__, "silu_and_mul")
    copy.__defaults__, copy.__kwdefaults__ = right.__defaults__, right.__kwdefaults__
    assert copy.__code__ == right.__code__
    assert copy.__code__ is not right.__code__
    (result,) = judge("silu_and_mul", copy, dtypes=("float32",), samples=("tokens",))
    assert (result.verdict, result.checks["provenance"]) == ("PASS", "ok")


def test_a_kernel_that_the_dispatcher_does_not_reach_is_caught() -> None:
    (case,) = find(["rms_norm[float32-tokens]"])
    right, never = kernel("rms_norm", honest.rms_norm()), lambda x, weight, *, eps: x
    with installed(Made("rms_norm", right)):
        subject = subject_of(case, 0)
        assert subject.expected is not None
        chosen = glm5_hal.backend.Kernel("rms_norm", "native", never)
        trial = runner.Trial(case, subject.inputs, chosen, ops.rms_norm, "cpu", subject.expected, probe_facts())
        finding = provenance.check(trial)
    assert (finding.ok, finding.detail) == (False, "the chosen kernel native did not run")


def probe_facts() -> Any:
    from glm5_hal.conformance.mutants.stand_in import probe

    return probe().facts


class _Callable:
    def __call__(self) -> None: ...

    def method(self) -> None: ...


@pytest.mark.parametrize("fn", [_Callable(), _Callable().method, functools.partial(_Callable().method)])
def test_every_kind_of_python_callable_has_its_code(fn: Callable[..., Any]) -> None:
    assert provenance.code_of(fn) in (_Callable.__call__.__code__, _Callable.method.__code__)


def test_a_callable_of_c_has_none() -> None:
    assert provenance.code_of(torch.add) is None


def test_numbers_that_leave_their_device_are_seen_and_lengths_may() -> None:
    seen = provenance.Transfers("cuda:0")
    with FakeTensorMode(), operations(seen):
        torch.empty(3, dtype=torch.int32, device="cuda").cpu()
        (torch.empty(4, device="cuda") + 1).sum().cpu()
        assert seen.moved == []
        torch.empty(4, 5, device="cuda", dtype=torch.bfloat16).to("cpu")
    assert seen.moved == ["torch.bfloat16 [4, 5]"]
