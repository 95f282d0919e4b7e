"""Every op is a torch operator: it compiles, fakes and refuses gradients as torch expects."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only
from toys import (
    CROWD,
    PAIR,
    PIPE,
    WRITE,
    first_sample,
    fresh_copy,
    installed,
    kernel_of,
    published,
    raised,
    stand_in,
    toy,
)

import glm5_hal
from glm5_hal import ops, torchlib
from glm5_hal.errors import HalError
from glm5_hal.ops import names, specs
from glm5_hal.torchlib import differentiable, schema

every_op = pytest.mark.parametrize("name", names())


def compiled(fn: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")


@pytest.fixture(autouse=True)
def _references(fresh: pytest.MonkeyPatch) -> Iterator[None]:
    """The references take every op whatever kernels there are; each test compiles afresh."""
    torch._dynamo.reset()
    with glm5_hal.use("cpu:reference"):
        yield


def outcome(name: str, call: Any, args: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """What a call returns and what it leaves in the arguments that it writes."""
    mine = fresh_copy(args)
    with torch.inference_mode():
        returned = call(**mine)
    return returned, {n: mine[n] for n in specs()[name].mutates if mine[n] is not None}


# Schemas


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (PAIR, '(Tensor x, Tensor? y=None, *, SymInt k=1, str mode="plain", bool flag=False) -> Tensor'),
        (WRITE, "(Tensor x, Tensor(a1!) cache) -> ()"),
        (PIPE, "(Tensor x, *, SymInt k=1) -> Tensor"),
    ],
)
def test_a_schema_is_read_from_the_annotations(spec: Any, text: str) -> None:
    assert schema(spec) == text


@every_op
def test_what_an_op_writes_is_in_its_schema_and_nothing_else(name: str) -> None:
    op, spec = getattr(ops, name), specs()[name]
    declared = {a.name: a.alias_info is not None and a.alias_info.is_write for a in op.torch_op._schema.arguments}
    assert {n for n, written in declared.items() if written} == set(spec.mutates)
    assert list(declared) == list(spec.signature.parameters)
    assert len(op.torch_op._schema.returns) == len(spec.outs)
    assert op.torch_op is getattr(torch.ops.glm5, name).default


# Fakes


def same_form(fake: Any, real: Any) -> None:
    for a, b in zip(_flat(fake), _flat(real), strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def _flat(outputs: Any) -> tuple[Tensor, ...]:
    return () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("called", ["op", "torch op"])
@pytest.mark.parametrize("after_a_real_call", [False, True])
@every_op
def test_a_fake_call_gives_the_shapes_dtypes_and_strides_of_a_real_one(
    name: str, after_a_real_call: bool, called: str
) -> None:
    op = getattr(ops, name)
    args = first_sample(specs()[name])
    op.clear()
    if after_a_real_call:
        outcome(name, op, args)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, args)
        faked = (op if called == "op" else op.torch_op)(**fakes)
    assert all(type(t).__name__ == "FakeTensor" for t in _flat(faked))
    same_form(faked, outcome(name, op, args)[0])


def test_a_fake_call_runs_no_kernel() -> None:
    def refuse(x: Any, y: Any = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Any:
        assert type(x) is Tensor
        return x

    with published(), installed(stand_in("acme", [kernel_of(PAIR, fn=refuse)])), glm5_hal.use("acme"):
        pair = toy(PAIR)
        pair(torch.ones(2, 3))
        with FakeTensorMode():
            assert pair(torch.ones(2, 3), k=3).shape == (2, 3)
            assert pair(torch.ones(2, 3)).shape == (2, 3)


def test_a_fake_call_that_is_wrong_is_refused() -> None:
    with FakeTensorMode():
        x = torch.ones(2, 3)
        assert raised(ops.rms_norm, x, torch.ones(4), eps=1e-5).code == "SHAPE"
        assert raised(torch.ops.glm5.rms_norm, x, torch.ones(4), eps=1e-5).code == "SHAPE"
        assert raised(torch.ops.glm5.rms_norm, x, torch.ones(3, dtype=torch.int32), eps=1e-5).code == "DTYPE"
        assert raised(torch.ops.glm5.rms_norm, x, torch.ones(3), eps=-1.0).code == "SCALAR"


def test_of_two_faults_a_fake_call_and_a_real_one_name_the_same() -> None:
    x, elsewhere = torch.ones(2, 3), {"device": "meta"}
    for weight, code in (
        (torch.ones(3, dtype=torch.int32, **elsewhere), "DTYPE"),
        (torch.ones(4, **elsewhere), "SHAPE"),
        (torch.ones(3, **elsewhere), "DEVICE"),
    ):
        assert raised(ops.rms_norm, x, weight, eps=1e-5).code == code
        assert raised(torchlib.fake(specs()["rms_norm"]), x, weight, eps=1e-5).code == code


@pytest.mark.parametrize("stranger", ["x", "weight"])
def test_one_meta_tensor_does_not_turn_a_call_into_a_fake_one(stranger: str) -> None:
    args = {"x": torch.ones(2, 3), "weight": torch.ones(3)}
    args[stranger] = args[stranger].to("meta")
    assert raised(torch.ops.glm5.rms_norm, **args, eps=1e-5).code == "DEVICE"
    compiled = torch.compile(lambda **kw: ops.rms_norm(**kw, eps=1e-5), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="'DEVICE'"), torch.no_grad():
        compiled(**args)


# torch.compile


@every_op
def test_a_compiled_call_equals_an_eager_one(name: str) -> None:
    op = getattr(ops, name)
    args = first_sample(specs()[name])
    want, left = outcome(name, op, args)
    got, found = outcome(name, compiled(lambda **kw: op(**kw)), args)
    for a, b in zip((*_flat(got), *found.values()), (*_flat(want), *left.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


UTILS = ("test_schema", "test_autograd_registration", "test_faketensor")


@every_op
def test_torchs_own_check_of_an_operator(name: str) -> None:
    op = getattr(ops, name)
    args = fresh_copy(first_sample(specs()[name]))
    positional = [args[n] for n, p in specs()[name].signature.parameters.items() if p.kind is not p.KEYWORD_ONLY]
    named = {n: args[n] for n, p in specs()[name].signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = torch.library.opcheck(op.torch_op, tuple(positional), named, test_utils=UTILS)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.slow
@every_op
def test_torchs_own_check_of_an_operator_under_dynamic_shapes(name: str) -> None:
    op, spec = getattr(ops, name), specs()[name]
    args = fresh_copy(first_sample(spec))
    positional = [args[n] for n, p in spec.signature.parameters.items() if p.kind is not p.KEYWORD_ONLY]
    named = {n: args[n] for n, p in spec.signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
    utils = ("test_aot_dispatch_dynamic",)
    assert set(torch.library.opcheck(op.torch_op, tuple(positional), named, test_utils=utils).values()) == {"SUCCESS"}


def test_new_sizes_do_not_compile_anew() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    norm = torch.compile(lambda x, w: ops.rms_norm(x, w, eps=1e-5) * 2, fullgraph=True, dynamic=True, backend=backend)
    with torch.inference_mode():
        for tokens in (3, 5, 8, 13):
            x, w = torch.randn(tokens, 16), torch.randn(16)
            torch.testing.assert_close(norm(x, w), ops.rms_norm(x, w, eps=1e-5) * 2, rtol=0, atol=0)
    assert len(graphs) == 1
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.glm5.rms_norm.default in calls, "an op is one node, its kernel is not inlined"


def test_a_scalar_may_come_from_a_size() -> None:
    def half(scores: Tensor, lens: Tensor) -> Any:
        return ops.topk_indices(scores, lens, top_k=scores.shape[1] // 2)

    choose = compiled(half, dynamic=True)
    for keys in (8, 12):
        scores, lens = torch.randn(3, keys), torch.full((3,), keys, dtype=torch.int32)
        assert choose(scores, lens).shape == (3, keys // 2)
        assert torch.equal(choose(scores, lens), half(scores, lens))


def test_the_policy_that_holds_when_compiled_code_runs_chooses_the_kernel() -> None:
    ran: list[str] = []

    def kernel(name: str) -> Any:
        def fn(x: Any, y: Any = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Any:
            ran.append(name)
            return x + k

        return stand_in(name, [kernel_of(PAIR, fn=fn)])

    with published(), installed(kernel("first"), kernel("second")):
        pair = toy(PAIR)
        add = compiled(lambda x: pair(x))
        for policy in ("first", "second", "first"):
            with glm5_hal.use(policy), torch.inference_mode():
                add(torch.ones(2, 3))
    assert ran == ["first", "second", "first"]


def test_an_op_that_writes_is_written_once_in_compiled_code() -> None:
    with published(), installed(stand_in("acme", [kernel_of(WRITE)])), glm5_hal.use("acme"):
        write = toy(WRITE)

        def step(x: Tensor, cache: Tensor) -> Tensor:
            write(x, cache)
            write(x, cache)
            return cache * 10

        cache = torch.zeros(2, 3)
        out = compiled(step)(torch.ones(2, 3), cache)
        assert cache.eq(2).all()
        assert out.eq(20).all()


@pytest.mark.slow
def test_inductor_takes_an_op() -> None:
    weight = torch.rand(64)
    norm = torch.compile(lambda x: ops.rms_norm(x + 1, weight, eps=1e-5) * 2, fullgraph=True)
    x = torch.randn(4, 64)
    with torch.inference_mode():
        torch.testing.assert_close(norm(x), ops.rms_norm(x + 1, weight, eps=1e-5) * 2, rtol=1e-6, atol=1e-6)


def test_a_draft_export_that_runs_the_real_op_while_it_traces() -> None:
    """torch says that it is compiling, and yet the real kernel is called: it must not go round in circles."""
    op = ops.rms_norm
    x, w = torch.randn(2, 4), torch.ones(4)
    want = op(x, w, eps=0.0)
    torch.compiler._is_compiling_flag = True
    try:
        assert torch.equal(op.torch_op(x, w, eps=0.0), want)
        assert torch.equal(op(x, w, eps=0.0), want)
    finally:
        torch.compiler._is_compiling_flag = False


FIRST_USE = """
import torch, glm5_hal
torch.set_num_threads(1)
def norm(x, w):
    return glm5_hal.ops.rms_norm(x, w, eps=1e-5) * 2
x, w = torch.randn(2, 8), torch.ones(8)
assert "glm5_hal.dispatch" not in __import__("sys").modules
with torch.inference_mode():
    got = torch.compile(norm, fullgraph=True, backend="aot_eager")(x, w)
    assert torch.equal(got, norm(x, w))
"""


def test_the_first_use_of_an_op_may_be_in_compiled_code() -> None:
    code = textwrap.dedent(FIRST_USE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# Gradients


def asking() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8), torch.nn.Parameter(torch.ones(8))


def norm(x: Tensor, w: Tensor) -> Any:
    return ops.rms_norm(x, w, eps=1e-5)


def test_a_gradient_is_refused_when_the_call_is_traced() -> None:
    """Compiled code runs without autograd, so a gradient that is not refused here would be lost in silence."""
    step = compiled(norm)
    with pytest.raises(Exception, match=r"HalError\('GRAD', .*torch\.inference_mode\(\)"):
        step(*asking())
    through_torch = compiled(lambda x, w: torch.ops.glm5.rms_norm(x, w, eps=1e-5))
    with pytest.raises(Exception, match=r"HalError\('GRAD'"):
        through_torch(*asking())
    inner = compiled(lambda x, w: norm(x * w, w.detach()))
    with pytest.raises(Exception, match=r"HalError\('GRAD'"):
        inner(*asking())


def test_weights_that_require_gradients_compile_where_none_is_asked_for() -> None:
    x, w = asking()
    step = compiled(norm)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(step(x, w), norm(x, w))
    with pytest.raises(Exception, match="GRAD"):
        step(x, w)

    def inside(x: Tensor, w: Tensor) -> Any:
        with torch.no_grad():
            return norm(x, w)

    assert not compiled(inside)(x, w).requires_grad


def test_a_functional_gradient_is_refused() -> None:
    with pytest.raises(HalError, match="no gradient"):
        torch.func.grad(lambda x: norm(x, torch.ones(8)).sum())(torch.randn(2, 8))


@every_op
def test_every_argument_that_could_ask_for_a_gradient_is_watched(name: str) -> None:
    op, spec = getattr(ops, name), specs()[name]
    args = fresh_copy(first_sample(spec))
    for arg in spec.args:
        value = args[arg.name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        assert differentiable(spec, arg)
        spoilt = {**args, arg.name: value.clone().requires_grad_()}
        assert raised(op, **spoilt).code == "GRAD"
        assert raised(op.torch_op, **spoilt).code == "GRAD"


def test_integers_are_not_differentiable() -> None:
    assert [differentiable(CROWD, a) for a in CROWD.args] == [True, True, True, False, True]
