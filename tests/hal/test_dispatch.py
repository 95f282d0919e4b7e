"""The hot path: which calls share a table entry, and what happens when there is no entry or the kernel raises."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from toys import CROWD, PAIR, PIPE, WRITE, installed, kernel_of, published, raised, stand_in, toy

import glm5_hal
from glm5_hal import context, dispatch, ops
from glm5_hal.backend import Kernel
from glm5_hal.capability import contiguous, dtype, limit, when
from glm5_hal.errors import HalError


@pytest.fixture(autouse=True)
def _fresh(fresh: pytest.MonkeyPatch) -> Iterator[None]:
    with published():
        yield


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*(shape or (2, 3)), dtype=dtype)


def crowd(**changes: Any) -> dict[str, Any]:
    return {"a": ones(), "b": ones(), "c": ones(), "d": ones(2, dtype=torch.int32), **changes}


class Counting:
    """A stand-in whose kernels know how often calls were resolved."""

    def __init__(self, spec: Any = PAIR, **more: Any) -> None:
        self.resolved = 0

        def count(call: Any) -> bool:
            self.resolved += 1
            return True

        watch = when(count, "counted", "none", reads=())
        self.record = stand_in("acme", [kernel_of(spec, requires=[watch], **more)])


def misses(first: Callable[[], Any], *then: Callable[[], Any], spec: Any = PAIR) -> int:
    """How many of the later calls are not served by the first one's entry."""
    counting = Counting(spec)
    with installed(counting.record):
        first()
        before = counting.resolved
        assert before == 1
        for call in then:
            call()
        return counting.resolved - before


# The table

pair, crowded = toy(PAIR), toy(CROWD)


def test_a_call_of_the_same_signature_is_not_resolved_again() -> None:
    assert (
        misses(lambda: pair(ones()), lambda: pair(ones()), lambda: pair(ones() * 7), lambda: pair(x=ones(), k=1)) == 0
    )


DIFFERENT: dict[str, Callable[[], Any]] = {
    "dtype": lambda: pair(ones(dtype=torch.float16)),
    "shape": lambda: pair(ones(3, 3)),
    "an optional that is given": lambda: pair(ones(), ones()),
    "an integer": lambda: pair(ones(), k=2),
    "a string": lambda: pair(ones(), mode="fancy"),
    "a bool": lambda: pair(ones(), flag=True),
    "a subclass of the first tensor": lambda: pair(torch.nn.Parameter(ones(), requires_grad=False)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_calls_that_differ_in_what_is_read_have_entries_of_their_own(what: str) -> None:
    assert misses(lambda: pair(ones()), DIFFERENT[what], DIFFERENT[what]) == 1


def within(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    def call() -> Any:
        with glm5_hal.use(*args, **kwargs):
            return pair(ones())

    return call


@pytest.mark.parametrize(
    "other",
    [within("acme"), within(require="sorted_indices"), within(check="metadata")],
    ids=["policy", "require", "check"],
)
def test_each_policy_requirement_and_check_level_has_entries_of_its_own(other: Callable[[], Any]) -> None:
    assert misses(lambda: pair(ones()), other, other, lambda: pair(ones())) == 1


def test_inference_mode_has_entries_of_its_own_where_tensors_are_known_by_a_guard() -> None:
    @torch.inference_mode()
    def inferring() -> None:
        crowded(**crowd())

    assert misses(lambda: crowded(**crowd()), inferring, inferring, lambda: crowded(**crowd()), spec=CROWD) == 1


def test_strides_are_told_apart_only_where_a_kernel_reads_them() -> None:
    slanted = torch.ones(3, 2).t()
    assert misses(lambda: pair(ones()), lambda: pair(slanted)) == 0
    reading = stand_in("acme", [kernel_of(PAIR, requires=[contiguous("x")]), kernel_of(PAIR, "torch")])
    with installed(reading):
        assert pair.choose(ones()).name == "acme:native"
        pair(ones()), pair(slanted), pair(ones())
        assert pair.choose(slanted).name == "acme:torch"
        assert len(pair._table) == 2
        assert set(pair._table.values()) == {PAIR.reference}


def chose(names: list[str], name: str, **requires: Any) -> Any:
    def fn(x: Any, y: Any = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Any:
        names.append(name)
        return x + k

    backend, provider = name.split(":")
    return stand_in(backend, [kernel_of(PAIR, provider, fn, **requires)])


def test_strides_that_a_candidate_refused_are_read_too() -> None:
    """The second backend served the slanted call; it must not go on to serve the straight ones."""
    ran: list[str] = []
    first, second = chose(ran, "first:native", requires=[contiguous("x")]), chose(ran, "second:native")
    with installed(first, second), glm5_hal.use("first,second"):
        pair(torch.ones(3, 2).t())
        pair(ones())
        pair(torch.ones(3, 2).t())
    assert ran == ["second:native", "first:native", "second:native"]


def test_one_and_true_and_one_point_zero_are_not_the_same_number() -> None:
    with installed(stand_in("acme", [kernel_of(PAIR), kernel_of(CROWD)])):
        for op, args in ((pair, {"x": ones()}), (crowded, crowd())):
            op(**args, k=1)
            for _ in range(2):
                assert raised(op, **args, k=True).code == "TYPE"
                assert raised(op, **args, k=1.0).code == "TYPE"
                assert raised(op, **args, flag=0).code == "TYPE"
            op(**args, k=1)


def test_the_table_is_cleared_before_it_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TABLE_LIMIT", 8)
    with installed(stand_in("acme", [kernel_of(PAIR), kernel_of(CROWD)])):
        for n in range(1, 40):
            assert pair(torch.zeros(n, 3), k=n)[0, 0] == n
            assert crowded(**crowd(), k=n)[0, 0] == n + 2
            assert len(pair._table) <= 8
            assert len(crowded._table) <= 8
        assert pair(torch.zeros(39, 3), k=39)[0, 0] == 39


def test_no_tensor_is_kept_alive() -> None:
    with installed(stand_in("acme", [kernel_of(PAIR), kernel_of(CROWD)])):
        args = crowd()
        alive = [weakref.ref(t) for t in args.values()]
        crowded(**args)
        pair(args["a"], args["b"])
        del args
        gc.collect()
        assert [ref() for ref in alive] == [None] * 4


def test_what_is_stored_is_the_bare_kernel() -> None:
    with installed(stand_in("acme", [kernel_of(PAIR), kernel_of(CROWD)])):
        pair(ones())
        crowded(**crowd())
        assert list(pair._table.values()) == [PAIR.reference]
        assert [entry[2] for entry in crowded._table.values()] == [CROWD.reference]


def test_reset_empties_every_table_and_the_guards() -> None:
    ran: list[str] = []
    for name in ("first:native", "second:native", "third:native"):
        with installed(chose(ran, name)):
            pair(ones())
            pair(ones())
    assert ran == [n for n in ("first:native", "second:native", "third:native") for _ in range(2)]


def test_an_entry_that_another_thread_is_about_to_remember_is_dead_once_the_table_is_cleared() -> None:
    """clear() between a thread's look-up and its remembering must not bring the old kernel back."""
    with installed(stand_in("acme", [kernel_of(CROWD)])):
        crowded(**crowd())
        (entry,) = crowded._table.values()
        args = list(crowd().values())
        assert entry[0](*args)
        context.reset()
        crowded._last[0] = entry
        assert not entry[0](*args)


def test_a_decision_that_was_made_before_a_reset_is_not_stored_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset_meanwhile(call: Any) -> bool:
        pair.clear()
        return True

    with installed(stand_in("acme", [kernel_of(PAIR, requires=[when(reset_meanwhile, "r", "f", reads=())])])):
        assert pair(ones())[0, 0] == 2
        assert pair._table == {}


# What is refused


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "no tensor": (lambda: pair([1.0]), "TYPE", "x is list, it should be a tensor"),
    "none": (lambda: pair(None), "TYPE", "x is NoneType"),
    "an array": (lambda: pair(ones().numpy()), "TYPE", "x is ndarray"),
    "no arguments": (lambda: pair.describe(), "TYPE", "missing a required argument"),
    "a list for a scalar": (lambda: pair(ones(), k=[1]), "TYPE", "k is [1]"),
    "a sparse tensor": (lambda: pair(ones().to_sparse()), "STRIDE", "layout torch.sparse_coo"),
    "a second sparse tensor": (lambda: pair(ones(), ones().to_sparse()), "STRIDE", "y has layout torch.sparse_coo"),
    "a crowd with a sparse one": (lambda: crowded(**crowd(b=ones().to_sparse())), "STRIDE", "b has layout"),
    "numbers for a scalar": (lambda: crowded(**crowd(), k=ones()), "TYPE", "k is tensor([[1., 1."),
    "an array for a scalar": (lambda: crowded(**crowd(), k=ones().numpy()), "TYPE", "k is array([[1., 1."),
    "a dtype": (lambda: pair(ones(dtype=torch.int64)), "DTYPE", "x is int64"),
    "a rank": (lambda: pair(ones(3)), "SHAPE", "needs 2 dims"),
    "a size": (lambda: pair(ones(), ones(3, 3)), "SHAPE", "T should be 2, not 3"),
    "mixed devices": (lambda: pair(ones(), ones().to("meta")), "DEVICE", "y is on meta and x on cpu"),
    "no backend for the device": (lambda: pair(ones().to("meta")), "NO_KERNEL", "policy 'auto' (default)"),
    "a crowd of lists": (lambda: crowded([1], [2], [3], [4]), "TYPE", "a is list"),
    "a crowd with a gap": (lambda: crowded(**crowd(b=None)), "TYPE", "b is NoneType"),
    "a crowd with another size": (lambda: crowded(**crowd(b=ones(3, 3))), "SHAPE", "T should be 2"),
    "a crowd on two devices": (lambda: crowded(**crowd(c=ones().to("meta"))), "DEVICE", "c is on meta"),
}


@pytest.mark.parametrize("after_a_good_call", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_a_call_that_is_wrong_is_refused_before_and_after_a_good_one(what: str, after_a_good_call: bool) -> None:
    call, code, words = REFUSED[what]
    with installed(stand_in("acme", [kernel_of(PAIR), kernel_of(CROWD)])):
        if after_a_good_call:
            pair(ones()), pair(ones(), ones()), crowded(**crowd()), crowded(**crowd())
        problem = raised(call)
    assert problem.code == code
    assert words in problem.what
    assert problem.fix


def test_another_device_than_the_named_backends() -> None:
    with installed(stand_in("acme", [kernel_of(PAIR)])), glm5_hal.use("acme"):
        problem = raised(pair, ones().to("meta"))
    assert problem.code == "NO_KERNEL"
    (step,) = problem.trace
    assert step.candidate == "acme"
    assert step.decision.code == "DEVICE"
    assert "the tensors are on meta, backend acme computes on cpu" in str(problem)


def test_without_a_kernel_the_error_has_the_reason_of_each_candidate() -> None:
    kernels = [
        kernel_of(PAIR, "native", requires=[limit("k", 1)]),
        kernel_of(PAIR, "torch", requires=[dtype("x", "float64")]),
    ]
    with installed(stand_in("acme", kernels)), glm5_hal.use("acme", require="deterministic"):
        problem = raised(pair, ones(), k=2)
    assert [s.decision.code for s in problem.trace] == ["ATTRIBUTE", "ATTRIBUTE"]
    with installed(stand_in("acme", kernels)), glm5_hal.use("acme"):
        problem = raised(pair, ones(), k=2)
    assert [s.candidate for s in problem.trace] == ["acme:native", "acme:torch"]
    assert "k must be <= 1, got 2" in str(problem)
    assert "x is float32, this kernel takes float64" in str(problem)
    assert "under policy 'acme' (hal.use)" in problem.what
    assert problem.fix == problem.trace[0].decision.fix


@pytest.mark.parametrize("path", ["eager", "torch op"])
@pytest.mark.parametrize("first", ["nothing", "a call", "a call without gradients"])
def test_a_gradient_is_refused_whatever_came_before(path: str, first: str) -> None:
    asking = {"a": ones().requires_grad_(), "b": torch.nn.Parameter(ones())}
    with installed(stand_in("acme", [kernel_of(PAIR), kernel_of(CROWD)])):
        call_pair, call_crowd = (pair, crowded) if path == "eager" else (pair.torch_op, crowded.torch_op)
        if first == "a call":
            call_pair(ones()), call_crowd(**crowd())
        if first == "a call without gradients":
            with torch.no_grad():
                for _ in range(2):
                    call_pair(asking["a"])
                    call_crowd(**crowd(**asking))
        for _ in range(2):
            for problem in (
                raised(call_pair, asking["a"]),
                raised(call_pair, ones(), asking["a"]),
                raised(call_crowd, **crowd(**asking)),
                raised(call_crowd, **crowd(c=asking["a"])),
            ):
                assert problem.code == "GRAD"
                assert "torch.inference_mode()" in problem.fix
        with torch.no_grad():
            assert not call_crowd(**crowd(**asking)).requires_grad
        with torch.inference_mode():
            call_pair(asking["a"])


TRANSFORMED: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "vmap": lambda f: torch.vmap(f)(ones(4, 2, 3)),
    "vmap over one": lambda f: torch.vmap(lambda x: f(ones(), x))(ones(4, 2, 3)),
    "vmap in vmap": lambda f: torch.vmap(torch.vmap(f))(ones(5, 4, 2, 3)),
    "jvp": lambda f: torch.func.jvp(f, (ones(),), (ones(),)),
    "grad of nothing": lambda f: torch.func.grad(lambda x: f(x.detach()).sum())(ones()),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("how", TRANSFORMED)
def test_a_kernel_is_never_given_the_wrapper_of_a_transform(how: str, first: bool) -> None:
    def native(x: Any, y: Any = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Any:
        x.data_ptr(), (x if y is None else y).data_ptr()
        return x + k

    with installed(stand_in("acme", [kernel_of(PAIR, fn=native), kernel_of(CROWD)])):
        if first:
            pair(ones()), pair(ones(), ones())
        problem = raised(TRANSFORMED[how], pair)
        assert problem.code == "TYPE"
        assert "torch.func transform" in problem.what
        assert pair(ones()).shape == (2, 3), "what was refused is not remembered"


def test_a_plain_tensor_in_a_transform_is_served() -> None:
    with installed(stand_in("acme", [kernel_of(PAIR)])):
        assert torch.vmap(lambda x: x * pair(ones()))(ones(4, 2, 3)).shape == (4, 2, 3)


# Kernels that raise


class Failing:
    def __init__(self, problem: BaseException, spec: Any = PAIR) -> None:
        self.problem, self.ran = problem, list[str]()
        self.record = stand_in(
            "acme",
            [kernel_of(spec, "native", self.kernel("native")), kernel_of(spec, "torch", self.kernel("torch"))],
        )

    def kernel(self, name: str) -> Callable[..., Any]:
        def fn(x: Any, y: Any = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Any:
            self.ran.append(name)
            raise self.problem

        return fn


def test_a_kernels_exception_is_reported_and_nothing_else_is_tried() -> None:
    failing = Failing(ValueError("odd shape"))
    with installed(failing.record, stand_in("other", [kernel_of(PAIR)])), glm5_hal.use("acme,other"):
        problem = raised(pair, ones())
        assert failing.ran == ["native"]
        again = raised(pair, ones())
        assert failing.ran == ["native", "native"], "and it is not remembered as bad"
    assert problem.code == again.code == "KERNEL"
    assert problem.what == "toy_pair: kernel acme:native (driver 1.2.3) raised ValueError: odd shape"
    assert problem.__cause__ is failing.problem
    assert problem.value is failing.problem
    assert [s.candidate for s in problem.trace] == ["acme:native"]
    assert "toy_pair=" in problem.fix


def test_a_kernels_exception_is_reported_of_a_call_that_it_has_spoilt() -> None:
    def spoil(x: Any, y: Any = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Any:
        x.resize_(7)
        raise ValueError("half way")

    with installed(stand_in("acme", [kernel_of(PAIR, fn=spoil)])):
        problem = raised(pair, ones())
    assert problem.code == "KERNEL"
    assert "raised ValueError: half way" in problem.what
    assert isinstance(problem.__cause__, ValueError)


def test_a_fault_of_the_guard_itself_is_not_taken_for_a_new_signature() -> None:
    def broken(*tensors: Any) -> bool:
        raise SystemError("the guard of another torch")

    with installed(stand_in("acme", [kernel_of(CROWD)])):
        crowded(**crowd())
        crowded._last[0] = [broken, None, None]
        with pytest.raises(SystemError, match="another torch"):
            crowded(**crowd())


def test_a_kernels_exception_is_reported_through_torch_too() -> None:
    failing = Failing(ValueError("odd shape"))
    with installed(failing.record):
        assert raised(pair.torch_op, ones()).code == "KERNEL"
    assert failing.ran == ["native"]


@pytest.mark.parametrize("problem", [KeyError("table"), AttributeError("size"), TypeError("unhashable")])
def test_a_kernels_exception_is_never_taken_for_the_tables_own(problem: Exception) -> None:
    failing = Failing(problem)
    with installed(failing.record):
        for _ in range(2):
            assert raised(pair, ones()).__cause__ is problem
    assert failing.ran == ["native", "native"]


def test_an_interrupt_is_not_a_kernels_failure() -> None:
    failing = Failing(KeyboardInterrupt())
    with installed(failing.record), pytest.raises(KeyboardInterrupt):
        pair(ones())


def test_a_kernel_that_leaves_does_not_take_the_process_with_it() -> None:
    failing = Failing(SystemExit(0))
    with installed(failing.record):
        for call in (pair, pair, pair.torch_op):
            problem = raised(call, ones())
            assert problem.code == "KERNEL"
            assert "acme:native (driver 1.2.3) raised SystemExit: 0" in problem.what


def test_a_kernels_exception_whose_message_cannot_be_read_is_reported() -> None:
    class Mute(Exception):  # noqa: N818 - a vendor's
        def __str__(self) -> str:
            raise RuntimeError("mute")

    with installed(Failing(Mute()).record):
        problem = raised(pair, ones())
    assert problem.code == "KERNEL"
    assert "raised Mute: its message cannot be read" in problem.what


def test_the_error_of_a_composites_part_comes_through_as_it_is() -> None:
    pipe, failing = toy(PIPE), Failing(ValueError("odd shape"))
    with installed(failing.record):
        problem = raised(pipe, ones())
        assert problem.what.startswith("toy_pair: kernel acme:native")
        assert isinstance(problem.__cause__, ValueError)
    with installed(stand_in("acme")):
        problem = raised(pipe, ones())
        assert (problem.code, problem.__cause__) == ("NO_KERNEL", None)
        assert "toy_pair" in problem.what


def test_a_composites_parts_are_resolved_in_their_turn() -> None:
    ran: list[str] = []
    pipe = toy(PIPE)
    with installed(chose(ran, "first:native"), chose(ran, "second:native")):
        assert pipe(ones(), k=3)[0, 0] == 7
        with glm5_hal.use("first; toy_pair=second"):
            pipe(ones())
    assert ran == ["first:native"] * 2 + ["second:native"] * 2


# Values


def lengths(**changes: Any) -> dict[str, Any]:
    return {"scores": torch.zeros(2, 5), "seq_lens": torch.tensor([5, 5], dtype=torch.int32), "top_k": 2, **changes}


def test_values_are_checked_on_the_cpu_unless_that_is_switched_off() -> None:
    bad = torch.tensor([5, 6], dtype=torch.int32)
    ran: list[int] = []

    def topk(scores: Any, seq_lens: Any, *, top_k: int) -> Any:
        ran.append(int(seq_lens.max()))
        return scores

    with installed(stand_in("acme", [Kernel("topk_indices", "native", topk)])):
        ops.topk_indices(**lengths())
        for _ in range(2):
            problem = raised(ops.topk_indices, **lengths(seq_lens=bad))
            assert problem.code == "VALUE"
            assert "seq_lens[1] is 6" in problem.what
        with glm5_hal.use(check="values"):
            assert raised(ops.topk_indices, **lengths(seq_lens=bad)).code == "VALUE"
        assert ran == [5], "what is refused has not run"
        with glm5_hal.use(check="metadata"):
            ops.topk_indices(**lengths(seq_lens=bad))
        assert ran == [5, 6]


def test_values_elsewhere_are_read_only_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    read: list[int] = []
    spec = dataclasses.replace(PAIR, name="toy_checked", check_values=lambda args: read.append(1))
    op = toy(spec)
    with published(toy_checked=spec), installed(stand_in("acme", [kernel_of(spec)], device_type="meta")):
        op(ones().to("meta"))
        assert read == []
        with glm5_hal.use(check="values"):
            op(ones().to("meta"))
        assert read == [1]


# bind, choose, and the op as an object


def test_bind_hands_out_the_bare_kernel() -> None:
    with installed(stand_in("acme", [kernel_of(PAIR)])):
        assert pair.bind(ones()) is PAIR.reference
        glm5_hal.watch(counters=True)
        assert pair.bind(ones()) is PAIR.reference, "observed or not"
    with glm5_hal.use("cpu:reference"):
        assert ops.topk_indices.bind(**lengths()) is ops.topk_indices.spec.reference, "no values are checked"


def test_bind_and_choose_refuse_what_a_call_would_refuse() -> None:
    for method in (pair.bind, pair.choose, pair.describe):
        assert raised(method, ones(), k=0).code == "SCALAR"
    with installed(stand_in("acme")):
        assert raised(pair.bind, ones()).code == raised(pair.choose, ones()).code == "NO_KERNEL"


def test_an_op_is_a_documented_callable() -> None:
    assert (pair.__name__, pair.__doc__) == ("toy_pair", "x + y + k.")
    assert inspect.signature(pair) == PAIR.signature
    assert inspect.signature(ops.rms_norm) == ops.rms_norm.spec.signature
    assert repr(ops.rms_norm).startswith("<glm5_hal op rms_norm(x: torch.Tensor")
    assert callable(ops.rms_norm)


@pytest.mark.parametrize("name", ["rms_norm", "sparse_mla"])
def test_an_op_pickles_and_copies_as_itself(name: str) -> None:
    op = getattr(ops, name)
    for same in (pickle.loads(pickle.dumps(op)), copy.copy(op), copy.deepcopy({"op": op})["op"]):
        assert same is op


def test_positional_and_keyword_arguments_reach_the_kernel_as_they_were_given() -> None:
    seen: list[Any] = []

    def fn(x: Any, y: Any = None, *, k: int = 1, mode: str = "plain", flag: bool = False) -> Any:
        seen.append((x, y, k, mode, flag))
        return x

    x, y = ones(), ones()
    with installed(stand_in("acme", [kernel_of(PAIR, fn=fn)])):
        pair(x, y, k=2)
        pair(y=y, x=x, mode="fancy", flag=True)
        pair(x)
    assert [tuple(map(id, (a, b))) for a, b, *_ in seen] == [(id(x), id(y)), (id(x), id(y)), (id(x), id(None))]
    assert [rest for _, _, *rest in seen] == [[2, "plain", False], [1, "fancy", True], [1, "plain", False]]


def test_an_argument_is_written_in_place() -> None:
    cache = torch.zeros(2, 3)
    with installed(stand_in("acme", [kernel_of(WRITE)])):
        assert toy(WRITE)(ones(), cache) is None
        torch.ops.glm5.toy_write(ones(), cache)
    assert cache.eq(2).all()


def test_an_op_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="did you mean 'rms_norm'"):
        _ = ops.rms_nrom
    with pytest.raises(AttributeError):
        _ = ops._nothing


# Threads, forks, first uses


def test_first_calls_of_many_threads_at_once() -> None:
    seen: list[tuple[int, float]] = []
    problems: list[BaseException] = []
    start = threading.Barrier(16, timeout=20)

    def work(n: int) -> None:
        try:
            start.wait()
            for i in range(60):
                k = 1 + (n + i) % 5
                if n == 0 and i % 10 == 5:
                    context.reset()
                    context._process.catalogue = catalogue
                try:
                    seen.append((k, float(pair(torch.zeros(1 + i % 3, 3), k=k)[0, 0])))
                    seen.append((k, float(crowded(**crowd(), k=k)[0, 0]) - 2))
                except HalError as refusal:  # between the reset and the line below it nothing is installed
                    if refusal.code != "NO_KERNEL":
                        raise
        except BaseException as problem:  # noqa: BLE001 - shown below, in the main thread
            problems.append(problem)

    with installed(stand_in("acme", [kernel_of(PAIR), kernel_of(CROWD)])) as catalogue:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert problems == []
    assert len(seen) >= 16 * 60
    assert all(value == k for k, value in seen)


def in_python(script: str, **environment: str) -> Any:
    """What a new interpreter prints, as JSON."""
    import os

    env = {k: v for k, v in os.environ.items() if not k.startswith("GLM5_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_new_process_goes_by_its_environment_and_a_forked_one_by_its_own() -> None:
    """Also: an op first met by many threads is one op, and a child is not held up by locks that it cannot release."""
    found = in_python(
        """
        import json, os, threading, time
        import glm5_hal
        met, start = [], threading.Barrier(8)
        def meet():
            start.wait()
            met.append(glm5_hal.ops.rms_norm)
        threads = [threading.Thread(target=meet) for _ in range(8)]
        [t.start() for t in threads], [t.join() for t in threads]
        import torch
        from glm5_hal import ops, observe, context
        torch.set_num_threads(1)
        x, w = torch.ones(2, 4), torch.ones(4)
        name = lambda: ops.rms_norm.choose(x, w, eps=1e-5).name
        ops.rms_norm(x, w, eps=1e-5)
        result = {"parent": name(), "ops": len({id(op) for op in met}), "met": len(met)}
        release = threading.Event()
        def hold():
            with ops.rms_norm._lock, observe._state.lock, context.catalogue()._lock:
                release.wait(60)
        holder = threading.Thread(target=hold)
        holder.start()
        while not observe._state.lock.locked():
            time.sleep(0.01)
        os.environ["GLM5_BACKEND"] = "cpu:torch"
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            from glm5_hal import dispatch
            glm5_hal.watch(counters=True)
            ops.rms_norm(x, w, eps=1e-5)
            os.write(write, json.dumps({"name": name(), "counts": list(glm5_hal.counts())}).encode())
            os._exit(0)
        os.close(write)
        deadline = time.time() + 60
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.time() > deadline:
                os.kill(child, 9)
            time.sleep(0.01)
        result["child"] = json.loads(os.read(read, 10000) or b'"hung"')
        release.set()
        result["parent afterwards"] = name()
        print(json.dumps(result))
        """,
        GLM5_BACKEND="cpu:reference",
    )
    assert found["parent"] == "cpu:reference"
    assert (found["ops"], found["met"]) == (1, 8)
    assert found["child"] == {"name": "cpu:torch", "counts": ["rms_norm[cpu:torch]"]}
    assert found["parent afterwards"] == "cpu:reference"


def test_making_an_op_twice_gives_the_one_op() -> None:
    assert dispatch.make_op(PAIR) is dispatch.make_op(PAIR) is pair
