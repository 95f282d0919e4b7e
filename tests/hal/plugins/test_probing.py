"""What a probe finds, asked in a thread and in a child process: the answers are the same."""

from collections.abc import Callable
from pathlib import Path

import pytest

from glm5_hal.backend import Device, Unavailable
from glm5_hal.plugins import probe

from .site import HEAD, Site, hook, line_of, probe_in_a_child, probing, wait_for

ASKED = pytest.mark.parametrize("ask", [probe, probe_in_a_child], ids=["thread", "child"])
Ask = Callable[..., Device | Unavailable]


@ASKED
def test_a_device_that_is_there(site: Site, ask: Ask) -> None:
    site.install("acme")
    versions, features = {"sdk": "1.2"}, frozenset({"fp8", "bf16"})
    assert ask(site.record("acme")) == Device("cpu", "Acme One", "a1", versions=versions, features=features)


@ASKED
def test_a_typed_no_is_handed_on(site: Site, ask: Ask) -> None:
    site.install("acme", probing("return Unavailable('no card in a slot', 'put one in')"))
    assert ask(site.record("acme")) == Unavailable("no card in a slot", "put one in", fault=False)


@ASKED
def test_a_probe_may_say_itself_that_it_broke(site: Site, ask: Ask) -> None:
    site.install("acme", probing("return Unavailable('the driver is older than the card', 'update it', fault=True)"))
    assert ask(site.record("acme")) == Unavailable("the driver is older than the card", "update it", fault=True)


@ASKED
def test_a_no_without_words_gets_some(site: Site, ask: Ask) -> None:
    site.install("acme", probing("return Unavailable('', '')", smi=("acme-smi", "-L")))
    found = ask(site.record("acme"))
    assert isinstance(found, Unavailable)
    assert found.reason == "the probe gave no reason"
    assert "`acme-smi -L` answers" in found.fix
    assert not found.fault


#: body of the probe, how the reason goes on after "the probe", the line that it points at, what the fix says
BAD_PROBES: dict[str, tuple[str, str, str, str]] = {
    "raises": (
        "raise OSError('no driver')",
        " raised OSError: no driver",
        "raise OSError",
        "pip install -U 'acme-hal'",
    ),
    "lacks its SDK": (
        "import acme_sdk",
        " raised ModuleNotFoundError: No module named 'acme_sdk'",
        "import acme_sdk",
        "pip",
    ),
    "exits": ("raise SystemExit(1)", " raised SystemExit: 1", "raise SystemExit", "pip"),
    "claims odd evidence": (
        "return Device('cpu', 'A', 'a1', evidence='hearsay')",
        " raised HalError: evidence 'hearsay' is not one of",
        "return Device('cpu', 'A', 'a1', evidence",
        "say how",
    ),
    "returns nothing": ("pass", "'s answer is not usable: it is NoneType", "def probe", "correct probe()"),
    "returns True": ("return True", "'s answer is not usable: it is bool", "def probe", "correct probe()"),
    "takes another device for its own": (
        "return Device('xpu', 'A', 'a1')",
        "'s answer is not usable: the device is of type 'xpu', the backend says 'cpu'",
        "def probe",
        "correct probe()",
    ),
    "counts none": (
        "return Device('cpu', 'A', 'a1', count=0)",
        "'s answer is not usable: it counts 0",
        "def probe",
        "probe()",
    ),
    "has no features": (
        "return Device('cpu', 'A', 'a1', features=None)",
        "'s answer is not usable: features are a set and versions a dict, not NoneType and dict",
        "def probe",
        "correct probe()",
    ),
    "lists versions": (
        "return Device('cpu', 'A', 'a1', versions=['1'])",
        "'s answer is not usable: features are a set and versions a dict, not frozenset and list",
        "def probe",
        "correct probe()",
    ),
    "counts what cannot be shown": (
        "return Device('cpu', 'A', 'a1', count=type('I', (int,), {'__repr__': lambda s: 1 // 0})(1))",
        "'s answer is not usable: it counts a value of type I",
        "def probe",
        "correct probe()",
    ),
    "raises an error of ours without text": (
        "from glm5_hal import HalError\nraise HalError('PLUGIN', 7, fix=object())",
        " raised HalError: 7",
        "raise HalError",
        "pip install -U",
    ),
    "gives a version that is no text": (
        "return Device('cpu', 'A', 'a1', versions={'sdk': None})",
        "'s answer is not usable: names, features and versions are text, and None is NoneType",
        "def probe",
        "correct probe()",
    ),
}


@ASKED
@pytest.mark.parametrize("case", BAD_PROBES)
def test_a_probe_that_misbehaves_is_unavailable_with_reason_and_fix(site: Site, ask: Ask, case: str) -> None:
    body, reason, where, fix = BAD_PROBES[case]
    head = HEAD.replace("def probe():\n    return Device(", "def unused():\n    return dict(")
    file = site.install("acme", probing(body), head=head)
    found = ask(site.record("acme"))
    assert isinstance(found, Unavailable)
    assert found.reason.startswith(f"the probe{reason}")
    assert line_of(file, where) in found.reason
    assert fix in found.fix
    assert found.fault


@ASKED
def test_a_requirement_that_is_not_met_names_the_package_and_the_command(site: Site, ask: Ask) -> None:
    needs = {"acme-sdk": ">=2.9", "packaging": ">=9999", "pluggy": ">=1"}
    site.install("acme", probing("raise AssertionError('it was asked all the same')", requires=needs))
    found = ask(site.record("acme"))
    assert isinstance(found, Unavailable)
    assert "acme-sdk>=2.9 is needed and acme-sdk is not installed" in found.reason
    assert "packaging>=9999 is needed and" in found.reason
    assert "pluggy" not in found.reason
    assert found.fix == "pip install 'acme-sdk>=2.9' 'packaging>=9999'"
    assert not found.fault, "the probe is not to blame for what is not installed"


@ASKED
def test_a_plugin_that_is_not_ok_answers_with_its_own_reason(site: Site, ask: Ask) -> None:
    site.install("acme", "raise ValueError")
    record = site.record("acme")
    assert ask(record) == Unavailable(record.reason, record.fix, fault=True)


def test_a_probe_that_hangs_is_given_up(site: Site, gate: Path) -> None:
    file = site.install("acme", probing(wait_for(gate), smi=("acme-smi",)))
    found = probe(site.record("acme"), deadline=0.2)
    assert isinstance(found, Unavailable)
    assert found.reason == f"the probe did not answer within 0.2 s, at {line_of(file, 'while not')}"
    assert found.fix.startswith("see whether `acme-smi` answers")
    assert found.fault


def test_what_a_probe_prints_does_not_come_out(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.install("acme", probing("print('hello')\nreturn Device('cpu', 'A', 'a1')"))
    assert isinstance(probe(site.record("acme")), Device)
    assert capfd.readouterr() == ("", "")


def test_a_keyboard_interrupt_is_the_users_in_this_thread_and_the_plugins_in_its_own(site: Site) -> None:
    site.install("acme", probing("raise KeyboardInterrupt"))
    record = site.record("acme")
    found = probe(record)
    assert isinstance(found, Unavailable)
    assert "the probe raised KeyboardInterrupt" in found.reason
    with pytest.raises(KeyboardInterrupt):
        probe(record, None)


@ASKED
@pytest.mark.parametrize("answer", ["Unavailable(5, 'x')", "Unavailable('x', None)"])
def test_a_no_that_is_not_text_is_the_probes_fault(site: Site, ask: Ask, answer: str) -> None:
    site.install("acme", probing(f"return {answer}"))
    found = ask(site.record("acme"))
    assert isinstance(found, Unavailable)
    assert found.fault
    assert "reason and fix that are text" in found.reason


def test_an_exception_that_leaves_while_it_is_told_leaves_nothing(site: Site) -> None:
    body = "class Leaving(Exception):\n    def __str__(self): raise SystemExit(4)\nraise Leaving"
    site.install("acme", probing(body))
    found = probe(site.record("acme"))
    assert isinstance(found, Unavailable)
    assert "the probe raised Leaving: its message cannot be read" in found.reason


@ASKED
@pytest.mark.parametrize(
    "body",
    [
        "class No(Unavailable):\n    def __getattribute__(self, name): raise OSError('mine')\nreturn No('a', 'b')",
        "class Versions(dict):\n    def keys(self): raise OSError('mine')\n    __iter__ = keys\n"
        "return Device('cpu', 'A', 'a1', versions=Versions(a='1'))",
    ],
)
def test_an_answer_that_cannot_be_read_is_the_probes_fault(site: Site, ask: Ask, body: str) -> None:
    file = site.install("acme", probing(body))
    found = ask(site.record("acme"))
    assert isinstance(found, Unavailable)
    assert found.fault
    place = line_of(file, "raise OSError")
    assert found.reason == f"reading the probe's answer raised OSError: mine, at {place}"


def test_an_answer_is_kept_as_plain_text(site: Site) -> None:
    body = "class Text(str): ...\nreturn Device('cpu', Text('A'), 'a1', versions={'sdk': Text('1')})"
    site.install("acme", probing(body))
    found = probe(site.record("acme"))
    assert isinstance(found, Device)
    assert {type(text) for text in (found.name, *found.versions.values())} == {str}


def test_a_probe_that_answers_to_every_attribute_has_no_place(site: Site) -> None:
    odd = (
        "\nclass Odd:\n    def __getattr__(self, name): return Odd()\n    def __call__(self): return 5\nprobe = Odd()\n"
    )
    site.install("acme", odd + hook())
    found = probe(site.record("acme"))
    assert isinstance(found, Unavailable)
    assert found.reason == "the probe's answer is not usable: it is int, not Device or Unavailable"
