"""Loading: whatever a plugin does, the others load, and its record says what, where and what to do."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from glm5_hal.plugins import CODES, PluginRecord, find, load, settle

from .site import GOOD, Site, backend, hook, line_of, wait_for


def test_a_plugin_that_is_in_order(site: Site) -> None:
    site.install("acme")
    record = site.record("acme")
    assert (record.status, record.code, record.reason, record.fix) == ("ok", "", "", "")
    assert (record.value, record.dist, record.version, record.builtin) == ("acme_plugin", "acme-hal", "1.0", False)
    assert record.backend is not None
    assert record.backend.name == "acme"
    assert record.output == ""


def test_the_hook_may_sit_on_an_object_of_the_module(site: Site) -> None:
    source = """
    class Plugin:
        @hookimpl
        def glm5_backend(self):
            return Backend(name=NAME, device_type="cpu", probe=probe, kernels=kernels)
    plugin = Plugin()
    """
    site.install("acme", source, value="acme_plugin:plugin")
    assert site.record("acme").status == "ok"


#: source of the module, code, what the reason says, the line of the module it points at, what the fix says
BROKEN: dict[str, tuple[str, str, str, str, str]] = {
    "the SDK is not installed": (
        "import acme_sdk",
        "IMPORT",
        "ModuleNotFoundError: No module named 'acme_sdk'",
        "import acme_sdk",
        "install acme_sdk, or import it in probe() only",
    ),
    "the SDK is broken": (
        "raise OSError('libacme.so: cannot open shared object file')",
        "IMPORT",
        "OSError: libacme.so",
        "raise OSError",
        "pip install -U 'acme-hal'",
    ),
    "the module exits": (
        "raise SystemExit(3)",
        "IMPORT",
        "SystemExit: 3",
        "raise SystemExit",
        "pip uninstall acme-hal",
    ),
    "a failure beyond Exception": (
        "class Odd(BaseException): pass\nraise Odd('x')",
        "IMPORT",
        "Odd: x",
        "raise Odd",
        "pip install -U 'acme-hal'",
    ),
    "an exception without a message": (
        "raise ValueError",
        "IMPORT",
        "raised ValueError, at",
        "raise ValueError",
        "pip",
    ),
    "an exception whose message raises": (
        "class Odd(Exception):\n    def __str__(self): return 1 / 0\nraise Odd",
        "IMPORT",
        "Odd: its message cannot be read",
        "raise Odd",
        "pip",
    ),
    "a syntax error": (
        "def broken(:",
        "IMPORT",
        "SyntaxError: invalid syntax",
        "def broken",
        "pip install -U 'acme-hal'",
    ),
    "a failure inside a library": (
        "import json\njson.loads('{')",
        "IMPORT",
        "JSONDecodeError",
        "json.loads('{')",
        "pip install -U 'acme-hal'",
    ),
    "no hook": (
        "",
        "HOOK_MISSING",
        "has no function glm5_backend",
        "",
        "@hookimpl\ndef glm5_backend(): return Backend",
    ),
    "a hook without the decorator": (
        hook(decorator=""),
        "HOOK_MISSING",
        "lacks the decorator @glm5_hal.hookimpl",
        "def glm5_backend",
        "from glm5_hal import Backend, hookimpl\n@hookimpl",
    ),
    "a hook with an argument": (
        hook(argument="device"),
        "HOOK_SPEC",
        "Argument(s) {'device'} are declared",
        "@hookimpl",
        "without arguments",
    ),
    "a hook of another name": (
        GOOD + "@hookimpl\ndef glm5_backends(): pass",
        "HOOK_SPEC",
        "unknown hook 'glm5_backends'",
        "",
        "no hook of another name",
    ),
    "a hook that raises": (
        "@hookimpl\ndef glm5_backend():\n    raise RuntimeError('no licence\\nask for one')",
        "HOOK_RAISED",
        "glm5_backend() raised RuntimeError: no licence, at",
        "raise RuntimeError",
        "pip install -U 'acme-hal'",
    ),
    "a hook that exits": (hook("exit(1)"), "HOOK_RAISED", "SystemExit: 1", "exit(1)", "pip"),
    "a hook that builds a wrong Backend": (
        hook('Backend("Acme", "cpu", probe, kernels)'),
        "HOOK_RAISED",
        "HalError: backend name 'Acme' is not usable",
        "return Backend",
        "use lower-case letters",
    ),
    "a field of a later core": (
        backend(graphs=True),
        "HOOK_RAISED",
        "unexpected keyword argument 'graphs'",
        "return Backend",
        "pip install -U 'acme-hal'",
    ),
    "a hook that returns nothing": (hook("None"), "HOOK_RESULT", "returned None, not a Backend", "@hookimpl", "one"),
    "a hook that returns something else": (
        hook("{}"),
        "HOOK_RESULT",
        "returned dict, not a Backend",
        "@hookimpl",
        "one",
    ),
    "two hooks": (
        GOOD + "@hookimpl(specname='glm5_backend')\ndef second(): return glm5_backend()",
        "HOOK_RESULT",
        "returned Backend and Backend",
        "",
        "return one",
    ),
    "a backend of another name": (
        hook('Backend("acme2", "cpu", probe, kernels)'),
        "NAME",
        "the entry point is called 'acme' and its backend 'acme2'",
        "@hookimpl",
        "call the entry point 'acme2' or the backend 'acme'",
    ),
    "a priority that is text": (
        backend(priority="high"),
        "FIELD",
        "Backend.priority is str",
        "@hookimpl",
        "correct priority",
    ),
    "a status command in bytes": (
        backend(smi=(b"acme-smi",)),
        "FIELD",
        "Backend.smi holds bytes, it should hold text",
        "@hookimpl",
        "correct smi",
    ),
    "a communicator that is no name": (
        backend(communicator=7),
        "FIELD",
        "Backend.communicator holds int",
        "@hookimpl",
        "correct communicator",
    ),
    "requirements that are a list": (
        backend(requires=["torch"]),
        "FIELD",
        "Backend.requires is list",
        "@hookimpl",
        "requires",
    ),
    "a hal_api that is text": (
        backend(hal_api="1"),
        "HAL_API",
        "hal_api '1' is neither an int nor a pair",
        "@hookimpl",
        "=1",
    ),
    "a hal_api that is a truth value": (backend(hal_api=True), "HAL_API", "hal_api True is neither", "@hookimpl", "=1"),
    "a hal_api upside down": (backend(hal_api=(2, 1)), "HAL_API", "hal_api (2, 1) is neither", "@hookimpl", "=1"),
    "a hal_api of three": (backend(hal_api=(1, 2, 3)), "HAL_API", "hal_api (1, 2, 3) is neither", "@hookimpl", "=1"),
    "a bad version range": (
        backend(requires={"acme-sdk": "2.9"}),
        "REQUIRES",
        "requires {'acme-sdk': '2.9'} is not",
        "@hookimpl",
        ">=2.9",
    ),
    "a version that is a number": (
        backend(requires={"acme-sdk": 2}),
        "REQUIRES",
        "{'acme-sdk': 2}",
        "@hookimpl",
        "PEP 440",
    ),
    "a bad distribution name": (
        backend(requires={"acme sdk": ">=2"}),
        "REQUIRES",
        "{'acme sdk'",
        "@hookimpl",
        "PEP 440",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_a_record_that_says_what_where_and_what_to_do(site: Site, case: str) -> None:
    source, code, reason, where, fix = BROKEN[case]
    file = site.install("acme", source)
    site.install("zeta")
    record, other = site.records()
    assert (record.status, record.code, record.backend) == ("broken", code, None)
    assert reason in record.reason
    assert not where or line_of(file, where) in record.reason
    assert fix in record.fix
    assert other.status == "ok", "one broken plugin must not take another down"


def test_every_code_is_covered_here() -> None:
    elsewhere = {"METADATA", "NESTED", "ENTRY_POINT", "TIMEOUT", "CRASH", "DUPLICATE", "BUILTIN_NAME"}
    assert {code for _, code, *_ in BROKEN.values()} | elsewhere == set(CODES)


@pytest.mark.parametrize(
    ("value", "says", "fix"),
    [
        (
            "gone_plugin",
            "ModuleNotFoundError: the entry point names gone_plugin, and there is no module gone_plugin",
            "pip",
        ),
        ("gone.plugin", "there is no module gone", "pip install -U 'acme-hal'"),
        ("acme_plugin:gone", "there is no 'gone'", "pip install -U 'acme-hal'"),
        ("not a module", "is not module or module:attribute", "pip install -U 'acme-hal'"),
    ],
)
def test_an_entry_point_that_names_nothing(site: Site, value: str, says: str, fix: str) -> None:
    site.install("acme", value=value)
    record = site.record("acme")
    assert (record.status, record.code) == ("broken", "ENTRY_POINT")
    assert says in record.reason
    assert fix in record.fix


def test_an_entry_point_that_names_the_hook_itself(site: Site) -> None:
    site.install("acme", value="acme_plugin:glm5_backend")
    record = site.record("acme")
    assert record.code == "HOOK_MISSING"
    assert record.fix == "name the module alone in the entry point: acme = 'acme_plugin'"


@pytest.mark.parametrize(
    ("source", "where"),
    [("{wait}" + GOOD, "while not"), ("@hookimpl\ndef glm5_backend():{indented}", "while not")],
    ids=["import", "hook"],
)
def test_a_plugin_that_hangs_is_given_up(site: Site, gate: Path, source: str, where: str) -> None:
    wait = wait_for(gate)
    file = site.install("acme", source.replace("{wait}", wait).replace("{indented}", wait.replace("\n", "\n    ")))
    site.install("zeta")
    start = time.monotonic()
    record, other = site.records(deadline=1.0)
    assert time.monotonic() - start < 9
    assert other.status == "ok"
    assert (record.status, record.code) == ("broken", "TIMEOUT")
    assert "did not end within 1 s" in record.reason
    assert line_of(file, where) in record.reason
    assert "import the vendor's SDK in probe() only" in record.fix


def test_outside_plugins_load_in_a_thread_and_builtin_ones_in_the_callers(site: Site) -> None:
    where = "import threading\nprint(threading.current_thread() is threading.main_thread())\n"
    site.install("acme", where + GOOD)
    (theirs,) = [record for record in find() if record.name == "acme"]
    for record, said in ((replace(theirs, builtin=True), "True\n"), (theirs, "False\n")):
        sys.modules.pop("acme_plugin", None)
        assert settle([record])[0].output == said


def test_a_keyboard_interrupt_is_the_users_in_this_thread_and_the_plugins_in_its_own(site: Site) -> None:
    site.install("acme", "raise KeyboardInterrupt")
    record = site.record("acme")
    assert (record.status, record.code) == ("broken", "IMPORT")
    assert "KeyboardInterrupt" in record.reason
    with pytest.raises(KeyboardInterrupt):
        load(PluginRecord("acme", "acme_plugin", "acme-hal", "1.0", builtin=False), None)


def test_nothing_that_a_plugin_does_comes_out_of_discovery(site: Site) -> None:
    class_that_lies = "def __getattr__(name): raise RuntimeError('asked for ' + name)"
    site.install("acme", class_that_lies)
    record = site.record("acme")
    assert record.status == "broken"
    assert record.reason
    assert record.fix
