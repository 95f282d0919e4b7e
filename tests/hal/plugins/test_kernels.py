"""Kernels are what their ops ask for, or the plugin is told what to write."""

import inspect
import textwrap

import pytest
import torch

import glm5_hal
from glm5_hal import context
from glm5_hal.backend import Kernel
from glm5_hal.catalogue import Catalogue
from glm5_hal.errors import HalError
from glm5_hal.plugins import load_kernels

from .site import GOOD, Site, line_of


def op(x: object, weight: object = None, *, eps: float = 1e-6) -> object: ...


SIGNATURES = {"rms_norm": inspect.signature(op), "rope": inspect.signature(op)}


def loaded(site: Site, body: str) -> tuple[Kernel, ...]:
    site.install("acme", f"\ndef kernels():\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n{GOOD}")
    return load_kernels(site.record("acme"), SIGNATURES)


FN = "def fn(x, weight=None, *, eps=1e-6): ...\n"


def test_kernels_come_in_the_order_of_the_plugin(site: Site) -> None:
    body = FN + "return [Kernel('rope', 'torch', fn), Kernel('rms_norm', 'native', fn), Kernel('rope', 'native', fn)]"
    assert [(k.op, k.provider) for k in loaded(site, body)] == [
        ("rope", "torch"),
        ("rms_norm", "native"),
        ("rope", "native"),
    ]


def test_annotations_are_not_compared(site: Site) -> None:
    body = (
        "def fn(x: 'Tensor', weight: int = None, *, eps: str = 1e-6) -> None: ...\nreturn [Kernel('rope', 'torch', fn)]"
    )
    assert len(loaded(site, body)) == 1


def kernel_of(signature: str) -> str:
    return f"def fn({signature}): ...\nreturn [Kernel('rope', 'torch', fn)]"


#: body of kernels(), code, what the error says, what the fix says
BAD_KERNELS: dict[str, tuple[str, str, str, str]] = {
    "raises": (
        "raise OSError('no compiler')",
        "PLUGIN",
        "kernels() raised OSError: no compiler, at ",
        "pip install -U",
    ),
    "exits": ("exit(1)", "PLUGIN", "kernels() raised SystemExit: 1", "pip"),
    "claims what there is not": (
        FN + "return [Kernel('rope', 'torch', fn, provides=frozenset({'fast'}))]",
        "PLUGIN",
        "unknown attributes ['fast']",
        "deterministic",
    ),
    "returns nothing": ("return None", "CONTRACT", "kernels() returned NoneType, not a sequence", "kernels_of"),
    "returns a generator": ("return (k for k in ())", "CONTRACT", "returned generator", "kernels_of"),
    "returns functions": (FN + "return [fn]", "CONTRACT", "kernels()[0] is function, not a Kernel", "glm5_hal.kernel"),
    "unknown op": (
        FN + "return [Kernel('rms_nrom', 'torch', fn)]",
        "CONTRACT",
        "kernel rms_nrom of provider torch is for an op",
        "did you mean 'rms_norm'",
    ),
    "one twice": (
        FN + "return [Kernel('rope', 'torch', fn), Kernel('rope', 'torch', fn)]",
        "CONTRACT",
        "kernel rope of provider torch is listed twice",
        "remove one",
    ),
    "a provider that cannot be named": (
        FN + "return [Kernel('rope', 'a:b', fn)]",
        "CONTRACT",
        "no policy can name",
        "lower-case",
    ),
    "a parameter too few": (
        kernel_of("x, *, eps=1e-6"),
        "CONTRACT",
        "lacks the parameter 'weight'",
        "def rope(x, weight=None, *, eps=1e-06)",
    ),
    "a parameter too many": (
        kernel_of("x, weight=None, out=None, *, eps=1e-6"),
        "CONTRACT",
        "has a parameter 'out'",
        "def rope(x, weight",
    ),
    "another order": (
        kernel_of("weight, x=None, *, eps=1e-6"),
        "CONTRACT",
        "in the order weight, x, eps, its op in the order x, weight, eps",
        "def",
    ),
    "another kind": (
        kernel_of("x, weight=None, eps=1e-6"),
        "CONTRACT",
        "takes 'eps' as positional or keyword, its op as keyword-only",
        "def",
    ),
    "another default": (
        kernel_of("x, weight=None, *, eps=1e-5"),
        "CONTRACT",
        "has the default 1e-05 for 'eps', its op the default 1e-06",
        "def",
    ),
    "a default too many": (
        kernel_of("x=None, weight=None, *, eps=1e-6"),
        "CONTRACT",
        "has the default None for 'x', its op no default",
        "def",
    ),
    "a default too few": (kernel_of("x, weight=None, *, eps"), "CONTRACT", "has no default for 'eps'", "def"),
    "open arguments": (kernel_of("*args, **kwargs"), "CONTRACT", "lacks the parameter 'x'", "def"),
    "no function": (
        "return [Kernel('rope', 'torch', None)]",
        "CONTRACT",
        "cannot be inspected: TypeError",
        "wrap it in a function",
    ),
    "an op that is no text": (
        FN + "return [Kernel(['rope'], 'torch', fn)]",
        "CONTRACT",
        "kernels()[0] has list for its op, which is plain text",
        "write the op as a str",
    ),
    "a provider that is taken": (
        FN + "return [Kernel('rope', 'composite', fn)]",
        "CONTRACT",
        "a provider's name that is taken: it is an op's default",
        "say native",
    ),
    "another name that is taken": (
        FN + "return [Kernel('rope', 'auto', fn)]",
        "CONTRACT",
        "is taken: in a policy",
        "na",
    ),
    "a sequence that raises": (
        "from collections import UserList\nclass Odd(UserList):\n    def __getitem__(self, at): raise OSError('item')\n"
        "return Odd([1])",
        "PLUGIN",
        "reading what kernels() returned raised OSError: item, at ",
        "pip install -U",
    ),
    "a sequence that leaves": (
        "from collections import UserList\nclass Odd(UserList):\n    def __len__(self): exit(0)\n"
        "    def __iter__(self): exit(0)\nreturn Odd([1])",
        "PLUGIN",
        "reading what kernels() returned raised SystemExit: 0, at ",
        "pip install -U",
    ),
    "a signature that raises": (
        "class Odd:\n    __signature__ = property(lambda self: 1 // 0)\n    def __call__(self): ...\n"
        "return [Kernel('rope', 'torch', Odd())]",
        "CONTRACT",
        "cannot be inspected: ZeroDivisionError",
        "def rope(x",
    ),
    "a default that cannot be shown": (
        "class Odd(float):\n    def __repr__(self): raise OSError\ndef fn(x, weight=None, *, eps=Odd()): ...\n"
        "return [Kernel('rope', 'torch', fn)]",
        "CONTRACT",
        "has the default a value of type",
        "def rope(x",
    ),
    "a coroutine function": (
        "async " + FN + "return [Kernel('rope', 'torch', fn)]",
        "CONTRACT",
        "(async def)",
        "def rope",
    ),
    "a coroutine of a class": (
        "class Odd:\n    async def __call__(self, x, weight=None, *, eps=1e-6): ...\n"
        "return [Kernel('rope', 'torch', Odd())]",
        "CONTRACT",
        "(async def)",
        "def rope",
    ),
    "a generator function": (
        "def fn(x, weight=None, *, eps=1e-6): yield x\nreturn [Kernel('rope', 'torch', fn)]",
        "CONTRACT",
        "is a generator function",
        "return the tensors",
    ),
    "a builtin": ("return [Kernel('rope', 'torch', max)]", "CONTRACT", "cannot be inspected: ValueError", "def rope(x"),
}


def test_a_subclass_of_kernel_is_read_once(site: Site) -> None:
    body = FN + "class Own(Kernel): ...\nreturn [Own('rope', 'torch', fn)]"
    (kernel,) = loaded(site, body)
    assert type(kernel) is Kernel


@pytest.mark.parametrize("case", BAD_KERNELS)
def test_a_kernel_that_is_not_what_its_op_asks_for(site: Site, case: str) -> None:
    body, code, says, fix = BAD_KERNELS[case]
    with pytest.raises(HalError) as caught:
        loaded(site, body)
    assert caught.value.code == code
    assert caught.value.what.startswith("plugin acme (acme-hal 1.0): ")
    assert says in caught.value.what
    assert fix in caught.value.fix


def test_a_default_of_an_equal_value_and_another_type_differs(site: Site) -> None:
    def takes(x: object, *, flag: bool = True) -> None: ...

    site.install("acme", "\ndef fn(x, *, flag=1): ...\ndef kernels(): return [Kernel('rope', 'torch', fn)]" + GOOD)
    with pytest.raises(HalError, match="has the default 1 for 'flag', its op the default True"):
        load_kernels(site.record("acme"), {"rope": inspect.signature(takes)})


def test_a_plugin_that_is_not_ok_has_no_kernels(site: Site) -> None:
    site.install("acme", "raise ValueError('x')")
    with pytest.raises(HalError, match=r"plugin acme .*ValueError: x") as caught:
        load_kernels(site.record("acme"), SIGNATURES)
    assert caught.value.code == "PLUGIN"


ODD = """
class Pairs:
    def __iter__(self):
        raise SystemExit(9)
class Odd:
    reads = {reads}
    def describe(self): return "odd"
    def test(self, call, facts): raise SystemExit(8)
def norm(x, weight, *, eps): ...
def kernels():
    return [Kernel('rms_norm', 'native', norm, (Odd(),))]
"""


def test_a_requirement_that_leaves_while_it_says_what_it_reads_is_told_with_its_place(site: Site) -> None:
    file = site.install("acme", ODD.format(reads="Pairs()") + GOOD)
    with pytest.raises(HalError) as caught:
        Catalogue([site.record("acme")]).all_kernels("acme")
    assert caught.value.code == "CONTRACT"
    assert f"SystemExit: 9, at {line_of(file, 'raise SystemExit(9)')}" in caught.value.what


def test_a_requirement_that_leaves_while_it_is_asked_is_told_with_its_place(site: Site) -> None:
    file = site.install("acme", ODD.format(reads="frozenset()") + GOOD)
    x = torch.ones(2, 3)
    with context.installed(Catalogue([site.record("acme")])), glm5_hal.use("acme"), pytest.raises(HalError) as caught:
        glm5_hal.ops.rms_norm(x, x[0], eps=1e-5)
    assert caught.value.code == "NO_KERNEL"
    assert f"SystemExit: 8, at {line_of(file, 'raise SystemExit(8)')}" in str(caught.value)


ANSWERS = """
from glm5_hal.capability import Accepted, Rejected
class Mute:
    def __repr__(self): raise OSError
class Rude:
    def __repr__(self): raise SystemExit(0)
class Own(Rejected):
    detail = property(lambda self: "no", lambda self, value: None)
class Odd:
    reads = frozenset()
    def describe(self): {describe}
    def test(self, call, facts): return {answer}
def norm(x, weight, *, eps): return x
def kernels():
    return [Kernel('rms_norm', 'native', norm, (Odd(),))]
"""


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("Mute()", "'odd' answered a value of type Mute, not Accepted or Rejected"),
        ("Rude()", "'odd' raised SystemExit: 0, at "),
        ("Rejected(None, object(), 'x')", "'odd' answered Rejected with NoneType where code, detail and fix are text"),
        ("Own('LIMIT', 'x', 'y')", "rejected  LIMIT  no  -> y"),
    ],
)
def test_an_answer_of_its_own_class_is_a_no_with_its_reason(site: Site, answer: str, says: str) -> None:
    site.install("acme", ANSWERS.format(answer=answer, describe="return 'odd'") + GOOD)
    with context.installed(Catalogue([site.record("acme")])), glm5_hal.use("acme"):
        told = glm5_hal.explain("rms_norm")
    assert not told.ok
    assert says in str(told)


def test_a_requirement_that_leaves_while_it_describes_itself_goes_by_its_class(site: Site) -> None:
    site.install("acme", ANSWERS.format(answer="5", describe="raise SystemExit(0)") + GOOD)
    with context.installed(Catalogue([site.record("acme")])), glm5_hal.use("acme"):
        assert "its requirement 'Odd' answered 5" in str(glm5_hal.explain("rms_norm"))
