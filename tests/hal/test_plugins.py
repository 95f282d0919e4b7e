"""Backend plugins: whatever one of them does, the others load, and its record says what, where and what to do."""

import importlib
import inspect
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from glm5_hal import plugins
from glm5_hal.backend import HAL_API, Device, Kernel, Unavailable
from glm5_hal.errors import HalError
from glm5_hal.hookspecs import GROUP
from glm5_hal.plugins import CODES, PluginRecord, discover, load_kernels, probe, probe_in_subprocess

HEAD = """
from glm5_hal import Backend, Device, Kernel, Unavailable, hookimpl
def probe():
    return Device(type="cpu", name="Acme One", arch="a1", versions={"sdk": "1.2"}, features=frozenset({"fp8", "bf16"}))
def kernels():
    return ()
"""
GOOD = """
@hookimpl
def glm5_backend():
    return Backend(name=NAME, device_type="cpu", probe=probe, kernels=kernels)
"""


class Site:
    """A folder on sys.path that plugins are installed into, as pip would leave them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def install(
        self,
        name: str,
        source: str | None = GOOD,
        *,
        dist: str = "",
        version: str = "1.0",
        value: str = "",
        head: str = HEAD,
        entry_points: str = "",
    ) -> Path:
        """Metadata of one distribution, and its module unless ``source`` is None. Returns the module's file."""
        dist, module = dist or f"{name}-hal", f"{name}_plugin"
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        lines = entry_points or f"[{GROUP}]\n{name} = {value or module}\n"
        (info / "entry_points.txt").write_text(lines)
        file = self.folder / f"{module}.py"
        if source is not None:
            file.write_text(f"NAME = {name!r}\n{head}{textwrap.dedent(source)}")
        importlib.invalidate_caches()
        return file

    def records(self, deadline: float = plugins.LOAD_DEADLINE) -> list[PluginRecord]:
        """What is discovered in this folder; a glm5-hal that is installed beside it is left out."""
        dists = {d.metadata["Name"] for d in metadata.distributions(path=[str(self.folder)])}
        return [record for record in discover(deadline=deadline) if record.dist in dists]

    def record(self, name: str, deadline: float = plugins.LOAD_DEADLINE) -> PluginRecord:
        (found,) = [record for record in self.records(deadline) if record.name == name]
        return found


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(str(made.folder))
    yield made
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that a hanging plugin waits for, so that its thread ends with the test."""
    file = tmp_path / "gate"
    yield file
    file.touch()
    for thread in threading.enumerate():
        if thread.name.startswith("glm5-hal plugin"):
            thread.join(5)
            assert not thread.is_alive()


def wait_for(gate: Path) -> str:
    return f"\nimport os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n"


def line_of(file: Path, text: str) -> str:
    """``file:line`` of the line that holds ``text``."""
    lines = file.read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if text in line]
    return f"{file}:{number}"


# Loading


def test_a_plugin_that_is_in_order(site: Site) -> None:
    site.install("acme")
    record = site.record("acme")
    assert (record.status, record.code, record.reason, record.fix) == ("ok", "", "", "")
    assert (record.value, record.dist, record.version, record.builtin) == ("acme_plugin", "acme-hal", "1.0", False)
    assert record.backend is not None
    assert record.backend.name == "acme"
    assert record.seconds > 0
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


def hook(result: str = 'Backend(NAME, "cpu", probe, kernels)', argument: str = "", decorator: str = "@hookimpl") -> str:
    return f"\n{decorator}\ndef glm5_backend({argument}):\n    return {result}\n"


def backend(**fields: object) -> str:
    more = "".join(f", {name}={value!r}" for name, value in fields.items())
    return hook(f'Backend(NAME, "cpu", probe, kernels{more})')


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
    elsewhere = {"METADATA", "ENTRY_POINT", "TIMEOUT", "DUPLICATE", "BUILTIN_NAME"}
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
    site.install("cpu", where + GOOD, dist="glm5-hal")
    site.install("acme", where + GOOD)
    assert [(record.name, record.output) for record in site.records()] == [("cpu", "True\n"), ("acme", "False\n")]


def test_a_keyboard_interrupt_is_the_users_and_passes_through(site: Site) -> None:
    site.install("acme", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        site.records()


def test_nothing_that_a_plugin_does_comes_out_of_discovery(site: Site) -> None:
    class_that_lies = "def __getattr__(name): raise RuntimeError('asked for ' + name)"
    site.install("acme", class_that_lies)
    record = site.record("acme")
    assert record.status == "broken"
    assert record.reason
    assert record.fix


# What plugins print


NOISE = """
import sys
print("hello from", NAME)
print("and a warning", file=sys.stderr)
sys.stdout.buffer.write(b"raw bytes\\n")
assert not sys.stdout.isatty()
sys.stderr.fileno()
"""


def test_what_a_plugin_prints_is_kept_in_its_record(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    site.install("acme", NOISE + GOOD)
    record = site.record("acme")
    assert record.status == "ok"
    assert record.output == "hello from acme\nand a warning\nraw bytes\n"
    assert capfd.readouterr() == ("", "")
    assert (sys.stdout, sys.stderr) == before


def test_what_a_broken_plugin_printed_is_kept_too_up_to_a_limit(site: Site) -> None:
    site.install("acme", "print('x' * 1_000_000)\nraise ValueError")
    record = site.record("acme")
    assert record.code == "IMPORT"
    assert 1000 < len(record.output) <= 65536


def test_a_plugin_that_wraps_stdout_does_not_take_it_away(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    wrap = "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, 'utf-8')\nprint('mine')\n"
    site.install("acme", wrap + GOOD)
    record = site.record("acme")
    print("ours")  # noqa: T201 - it must still come out
    assert (record.status, capsys.readouterr().out) == ("ok", "ours\n")


def test_what_other_threads_print_meanwhile_is_theirs(
    site: Site, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("acme", "print('from the plugin')" + wait_for(gate) + GOOD)
    found: list[PluginRecord] = []
    loading = threading.Thread(target=lambda: found.append(site.record("acme")))
    loading.start()
    while "acme_plugin" not in sys.modules:
        time.sleep(0.01)
    print("from the program")  # noqa: T201 - it is what is tested
    gate.touch()
    loading.join()
    assert capsys.readouterr().out == "from the program\n"
    assert found[0].output == "from the plugin\n"


def test_a_plugin_that_was_given_up_cannot_spoil_stdout_later(
    site: Site, gate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = tmp_path / "said"
    site.install("acme", wait_for(gate) + f"print('too late')\nopen({str(said)!r}, 'w').close()")
    assert site.record("acme", deadline=0.2).code == "TIMEOUT"
    gate.touch()
    while not said.exists():
        time.sleep(0.01)
    print("ours")  # noqa: T201 - it is what is tested
    assert capsys.readouterr().out == "ours\n"


# Versions of the contract


@pytest.mark.parametrize(
    ("api", "fix"),
    [
        (HAL_API[1] + 1, "pip install -U 'glm5-hal'"),
        ((HAL_API[1] + 1, HAL_API[1] + 3), "pip install -U 'glm5-hal'"),
        (HAL_API[0] - 1, "pip install -U 'acme-hal'"),
        ((HAL_API[0] - 2, HAL_API[0] - 1), "pip install -U 'acme-hal'"),
    ],
)
def test_a_contract_that_this_core_does_not_speak_says_which_side_to_upgrade(
    site: Site, api: int | tuple[int, int], fix: str
) -> None:
    site.install("acme", backend(hal_api=api))
    record = site.record("acme")
    assert (record.status, record.code, record.fix) == ("refused", "HAL_API", fix)
    assert f"this core speaks {HAL_API[0]}" in record.reason
    assert f"speaks hal_api {api if isinstance(api, int) else f'{api[0]} to {api[1]}'}," in record.reason


@pytest.mark.parametrize("api", [HAL_API[0], HAL_API[1], HAL_API, (HAL_API[0] - 1, HAL_API[0]), (HAL_API[1], 99)])
def test_a_range_that_meets_ours_is_spoken(site: Site, api: int | tuple[int, int]) -> None:
    site.install("acme", backend(hal_api=api))
    assert site.record("acme").status == "ok"


# Names, duplicates, order


def test_two_distributions_with_one_backend_name_are_both_refused(site: Site) -> None:
    site.install("acme", dist="acme-hal", version="1.0")
    site.install("acme", dist="acme-fork", version="2.1", value="acme_plugin")
    records = site.records()
    assert [record.dist for record in records] == ["acme-fork", "acme-hal"]
    for record in records:
        assert (record.status, record.code, record.backend) == ("refused", "DUPLICATE", None)
        assert "acme-fork 2.1 (acme_plugin) and acme-hal 1.0 (acme_plugin); neither is used" in record.reason
        assert record.fix == "uninstall one of them: pip uninstall acme-fork or pip uninstall acme-hal"


def test_one_distribution_that_offers_a_name_twice_is_refused(site: Site) -> None:
    twice = f"[{GROUP}]\nacme = acme_plugin\nacme = acme_plugin:again\n"
    site.install("acme", GOOD + "import sys\nagain = sys.modules[__name__]", entry_points=twice)
    assert [record.code for record in site.records()] == ["DUPLICATE", "DUPLICATE"]


def test_a_broken_rival_does_not_take_the_working_one_down(site: Site) -> None:
    site.install("acme", dist="acme-hal")
    site.install("acme", None, dist="acme-fork", value="gone_plugin")
    assert {record.dist: record.status for record in site.records()} == {"acme-hal": "ok", "acme-fork": "broken"}


def test_an_outside_plugin_cannot_take_a_builtin_name(site: Site) -> None:
    site.install("cpu", dist="glm5-hal", version="0.9")
    site.install("cpu", dist="fast-cpu", value="cpu_plugin")
    ours, theirs = site.records()
    assert (ours.dist, ours.builtin, ours.status) == ("glm5-hal", True, "ok")
    assert (theirs.dist, theirs.status, theirs.code) == ("fast-cpu", "refused", "BUILTIN_NAME")
    assert theirs.reason == "'cpu' is a built-in backend of glm5-hal 0.9, and fast-cpu 1.0 offers it too"
    assert "pip uninstall fast-cpu" in theirs.fix


def test_a_name_that_a_policy_needs_cannot_be_a_backends(site: Site) -> None:
    site.install("auto")
    assert site.record("auto").code == "NAME"


def test_metadata_that_is_found_twice_is_one_plugin(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site.folder), f"{site.folder}/"])
    assert [record.status for record in site.records()] == ["ok"]


@pytest.mark.parametrize("backwards", [False, True])
def test_stale_metadata_of_older_versions_is_not_a_second_plugin(
    site: Site, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    for version in ("0.9", "0.10", "0.8"):
        site.install("acme", version=version, value="acme_plugin" if version == "0.10" else "old_plugin")
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder=".": sorted(listed(folder), reverse=backwards))
    (record,) = site.records()
    assert (record.status, record.version, record.value) == ("ok", "0.10", "acme_plugin")


def test_of_two_folders_the_first_on_the_path_counts(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = Site(tmp_path / "later")
    monkeypatch.setattr(sys, "path", [*sys.path, str(later.folder)])
    later.install("acme", version="2.0")
    site.install("acme", version="1.0")
    (record,) = site.records()
    assert (record.status, record.version) == ("ok", "1.0")


def test_the_same_entry_point_given_twice_is_one_plugin(site: Site) -> None:
    site.install("acme")
    (point,) = metadata.distribution("acme-hal").entry_points
    assert [record.status for record in discover([point, point])] == ["ok"]


def test_an_entry_point_of_no_distribution(site: Site) -> None:
    site.install("acme", "raise ValueError")
    (record,) = discover([metadata.EntryPoint("acme", "acme_plugin", GROUP)])
    assert (record.dist, record.code) == ("", "IMPORT")
    assert "reinstall what offers the entry point acme = 'acme_plugin'" in record.fix


def test_entry_points_that_cannot_be_read_are_a_record_of_their_distribution(site: Site) -> None:
    site.install("acme", entry_points=f"[{GROUP}]\nno equals sign here\n")
    site.install("zeta")
    record = site.record("acme-hal")
    assert (record.status, record.code) == ("broken", "METADATA")
    assert "pip install -U 'acme-hal'" in record.fix
    assert site.record("zeta").status == "ok"


def test_a_distribution_that_cannot_be_read_at_all_hides_no_other(site: Site) -> None:
    site.install("acme")
    (site.folder / "odd-1.0.dist-info").mkdir()
    (site.folder / "odd-1.0.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe\x00")
    (site.folder / "zeta_hal-1.0.dist-info").mkdir()
    (site.folder / "zeta_hal-1.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\nzeta = gone\n")
    importlib.invalidate_caches()
    found = {record.name: (record.dist, record.code) for record in discover() if record.name in ("acme", "zeta")}
    assert found == {"acme": ("acme-hal", ""), "zeta": ("", "ENTRY_POINT")}


def test_builtin_plugins_come_first_then_priority_then_name(site: Site) -> None:
    for name, fields in (("beta", {}), ("alpha", {}), ("omega", {"priority": 5}), ("late", {"priority": -1})):
        site.install(name, backend(**fields))
    site.install("broken", "raise ValueError")
    builtins = f"[{GROUP}]\nzeta = zeta_plugin\ncpu = cpu_plugin\n"
    site.install("zeta", backend(priority=9), dist="glm5-hal", entry_points=builtins)
    (site.folder / "cpu_plugin.py").write_text(f"NAME = 'cpu'\n{HEAD}{GOOD}")
    assert [record.name for record in site.records()] == ["cpu", "zeta", "omega", "alpha", "beta", "broken", "late"]


# Probing, in process and in a child process

ASKED = pytest.mark.parametrize("ask", [probe, probe_in_subprocess], ids=["thread", "child"])
Ask = Callable[..., Device | Unavailable]


def probing(body: str, **fields: object) -> str:
    return f"\ndef probe():\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n{backend(**fields)}"


@ASKED
def test_a_device_that_is_there(site: Site, ask: Ask) -> None:
    site.install("acme")
    versions, features = {"sdk": "1.2"}, frozenset({"fp8", "bf16"})
    assert ask(site.record("acme")) == Device("cpu", "Acme One", "a1", versions=versions, features=features)


@ASKED
def test_a_typed_no_is_handed_on(site: Site, ask: Ask) -> None:
    site.install("acme", probing("return Unavailable('no card in a slot', 'put one in')"))
    assert ask(site.record("acme")) == Unavailable("no card in a slot", "put one in")


@ASKED
def test_a_no_without_words_gets_some(site: Site, ask: Ask) -> None:
    site.install("acme", probing("return Unavailable('', '')", smi=("acme-smi", "-L")))
    found = ask(site.record("acme"))
    assert isinstance(found, Unavailable)
    assert found.reason == "the probe gave no reason"
    assert "`acme-smi -L` answers" in found.fix


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
    assert found.reason.startswith(plugins.BROKEN_PROBE)


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
    assert not found.reason.startswith(plugins.BROKEN_PROBE)


@ASKED
def test_a_plugin_that_is_not_ok_answers_with_its_own_reason(site: Site, ask: Ask) -> None:
    site.install("acme", "raise ValueError")
    record = site.record("acme")
    assert ask(record) == Unavailable(record.reason, record.fix)


def test_a_probe_that_hangs_is_given_up(site: Site, gate: Path) -> None:
    file = site.install("acme", probing(wait_for(gate), smi=("acme-smi",)))
    found = probe(site.record("acme"), deadline=0.2)
    assert isinstance(found, Unavailable)
    assert found.reason == f"the probe did not answer within 0.2 s, at {line_of(file, 'while not')}"
    assert found.fix.startswith("see whether `acme-smi` answers")


def test_what_a_probe_prints_does_not_come_out(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    site.install("acme", probing("print('hello')\nreturn Device('cpu', 'A', 'a1')"))
    assert isinstance(probe(site.record("acme")), Device)
    assert capfd.readouterr() == ("", "")


def test_a_keyboard_interrupt_in_a_probe_passes_through(site: Site) -> None:
    site.install("acme", probing("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        probe(site.record("acme"))


# Probing in a child process: what a thread could not survive


def in_a_child(site: Site, body: str, deadline: float = 20.0) -> Device | Unavailable:
    site.install("acme", probing(body))
    return probe_in_subprocess(site.record("acme"), deadline)


def broken_in_a_child(site: Site, body: str, deadline: float = 20.0) -> str:
    found = in_a_child(site, body, deadline)
    assert isinstance(found, Unavailable)
    assert found.reason.startswith(plugins.BROKEN_PROBE)
    assert "see whether the driver answers; pip install -U 'acme-hal'" in found.fix
    return found.reason


def test_a_crash_costs_the_child_alone_and_says_which_signal_and_where(site: Site) -> None:
    reason = broken_in_a_child(site, "import ctypes\nctypes.string_at(0)")
    assert reason == f"the probe died with SIGSEGV, at {line_of(site.folder / 'acme_plugin.py', 'string_at(0)')}"


def test_an_abort_without_a_python_frame_brings_its_last_words(site: Site) -> None:
    body = (
        "import os, signal\nos.write(2, b'terminate called after acme::error\\n')\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    reason = broken_in_a_child(site, body)
    assert reason == "the probe died with SIGKILL; its last words: terminate called after acme::error"


@pytest.mark.parametrize("status", [0, 3])
def test_a_probe_that_ends_the_process(site: Site, status: int) -> None:
    reason = broken_in_a_child(site, f"import os\nos._exit({status})")
    assert reason == f"the probe ended its process with status {status} and without an answer"


def test_a_hang_costs_the_deadline_and_leaves_no_process_behind(site: Site, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    body = f"""
    import os, subprocess, time
    helper = subprocess.Popen(["sleep", "600"])
    open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{helper.pid}}")
    time.sleep(600)
    """
    start = time.monotonic()
    reason = broken_in_a_child(site, body, deadline=3.0)
    assert 3.0 <= time.monotonic() - start < 8
    assert reason == f"the probe did not answer within 3 s, at {line_of(site.folder / 'acme_plugin.py', 'time.sleep')}"
    for pid in pids.read_text().split():
        assert gone(int(pid))


def gone(pid: int) -> bool:
    """No such process, or only its entry in the table: who adopts orphans may be slow to bury them."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


def test_a_hang_that_never_lets_python_run_is_ended_too(site: Site) -> None:
    body = "import ctypes\nctypes.PyDLL(None).sleep(600)"
    assert "did not answer within 2.5 s, at " in broken_in_a_child(site, body, deadline=2.5)


@pytest.mark.parametrize(
    "body",
    [
        "print('{}'); print('x' * 10_000_000)",
        "import os; [os.write(1, b'x' * 100_000 + b'\\n') for _ in range(100)]",
        "import os; [os.write(2, b'x' * 100_000) for _ in range(100)]",
        "import subprocess; subprocess.Popen(['sleep', '600'])",
        "import os, time; os.fork() or time.sleep(600)",
    ],
    ids=["print", "stdout", "stderr", "helper", "fork"],
)
def test_neither_noise_nor_a_process_left_behind_hides_the_answer(site: Site, body: str) -> None:
    start = time.monotonic()
    assert isinstance(in_a_child(site, f"{body}\nreturn Device('cpu', 'A', 'a1')"), Device)
    assert time.monotonic() - start < 10


def test_the_child_loads_the_one_plugin_and_no_other(site: Site, tmp_path: Path) -> None:
    loaded = tmp_path / "loaded"
    site.install("acme")
    site.install("zeta", f"with open({str(loaded)!r}, 'a') as f: f.write('x')" + GOOD)
    assert isinstance(probe_in_subprocess(site.record("acme")), Device)
    assert loaded.read_text() == "x", "by discovery in this process, not by the child"


def test_a_plugin_that_the_child_cannot_load(site: Site) -> None:
    file = site.install("acme")
    record = site.record("acme")
    file.write_text("raise ValueError('changed')")
    found = probe_in_subprocess(record)
    assert isinstance(found, Unavailable)
    assert "could not load the plugin: importing acme_plugin raised ValueError: changed" in found.reason
    assert found.reason.startswith(plugins.BROKEN_PROBE)


def test_an_interpreter_that_cannot_be_started(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("acme")
    record = site.record("acme")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    found = probe_in_subprocess(record)
    assert isinstance(found, Unavailable)
    assert "could not be started: FileNotFoundError" in found.reason


# Kernels


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
    "a builtin": ("return [Kernel('rope', 'torch', max)]", "CONTRACT", "cannot be inspected: ValueError", "def rope(x"),
}


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


# The cost


def test_neither_plugins_nor_policy_import_torch() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}; import glm5_hal.plugins, glm5_hal.policy"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
