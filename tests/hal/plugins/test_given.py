"""A plugin that no entry point names: by its path or its module, and checked as an installed one is."""

import os
import sys
from pathlib import Path

import pytest

from glm5_hal import context
from glm5_hal.backend import Device
from glm5_hal.plugins import PluginRecord, check_up

from .site import GOOD, HEAD, Site, backend, discover, line_of

SOURCE = f"NAME = 'wip'\n{HEAD}{GOOD}"


@pytest.fixture(autouse=True)
def _imports(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be imported is as it was afterwards. Nothing below is on the path."""
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)


def given(text: str, *others: str) -> PluginRecord:
    (found,) = [record for record in discover(given=[text, *others]) if record.given == text]
    return found


def written(path: str, source: str = SOURCE) -> Path:
    file = Path(path).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
    return file


def test_a_file_is_a_plugin_under_its_backends_own_name() -> None:
    written("work/my-plugin.py")
    record = given("work/my-plugin.py")
    assert (record.name, record.status, record.value) == ("wip", "ok", "my_plugin")
    assert record.origin == "plugin work/my-plugin.py"
    assert record.backend is not None


def test_a_file_may_import_what_lies_beside_it() -> None:
    written("work/beside_it.py", "ANSWER = 42\n")
    written("work/plugin_a.py", SOURCE + "import beside_it\nassert beside_it.ANSWER == 42\n")
    assert given("work/plugin_a.py").status == "ok"


@pytest.mark.parametrize("text", ["src/wip_package", "src/wip_package/", "src/wip_package/__init__.py"])
def test_a_packages_folder_is_a_plugin(text: str) -> None:
    written("src/wip_package/parts.py", "ANSWER = 42\n")
    written("src/wip_package/__init__.py", SOURCE + "from . import parts\nimport wip_package.parts as p\n")
    record = given(text)
    assert (record.name, record.status, record.value) == ("wip", "ok", "wip_package"), record.reason


def test_a_module_is_a_plugin(site: Site) -> None:
    written(f"{site.folder}/wip_module.py")
    assert given("wip_module").name == "wip"


def test_its_probe_is_asked_in_a_process_of_its_own_too() -> None:
    written("work/plugin_b.py")
    assert isinstance(check_up(given("work/plugin_b.py"), last="probe").found, Device)


BROKEN: dict[str, tuple[str, str, str, str]] = {
    "raises": ("1 / 0\n", "IMPORT", "importing bad_plugin raised ZeroDivisionError", "mend work/bad_plugin.py"),
    "has no hook": ("x = 1\n", "HOOK_MISSING", "bad_plugin has no function glm5_backend", "Backend(name='acme'"),
    "is of another contract": (
        f"NAME = 'wip'\n{HEAD}{backend(hal_api=99)}",
        "HAL_API",
        "the plugin speaks hal_api 99",
        "pip install -U 'glm5-hal'",
    ),
    "is of a contract of the past": (
        f"NAME = 'wip'\n{HEAD}{backend(hal_api=0)}",
        "HAL_API",
        "the plugin speaks hal_api 0",
        "mend work/bad_plugin.py",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_that_is_broken_says_so_as_an_installed_one_would(case: str) -> None:
    source, code, reason, fix = BROKEN[case]
    file = written("work/bad_plugin.py", source)
    record = given("work/bad_plugin.py")
    assert (record.status == "ok", record.code, record.backend) == (False, code, None)
    assert reason in record.reason
    assert fix in record.fix
    if case == "raises":
        assert line_of(file, "1 / 0") in record.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("work/nowhere.py", "there is no work/nowhere.py"),
        ("empty", "has no __init__.py"),
        ("no_such_module", "there is no module no_such_module"),
        ("acme.zip", "acme.zip is neither a .py file nor a package's folder"),
        ("loop.py", "loop.py is a link that leads nowhere"),
        ("work/" + "x" * 5000, "there is no work/xxx"),
        ("not a module", "is not module or module:attribute"),
    ],
)
def test_one_that_is_not_there_is_told_apart(text: str, reason: str) -> None:
    Path("empty").mkdir()
    Path("acme.zip").touch()
    Path("loop.py").symlink_to("loop.py")
    record = given(text)
    assert (record.status, record.code) == ("broken", "ENTRY_POINT")
    assert reason in record.reason
    assert record.fix


def test_it_takes_nobodys_name(site: Site) -> None:
    site.install("wip")
    written("work/plugin_c.py")
    record = given("work/plugin_c.py")
    assert (record.status, record.code) == ("refused", "DUPLICATE")
    assert record.fix == "uninstall one of them: leave out --plugin work/plugin_c.py or pip uninstall wip-hal"
    written("work/plugin_d.py", SOURCE.replace("'wip'", "'cpu'"))
    record = given("work/plugin_d.py")
    assert (record.status, record.code) == ("refused", "BUILTIN_NAME")
    assert "leave out --plugin work/plugin_d.py" in record.fix


def test_it_replaces_no_module_that_is_loaded() -> None:
    written("work/json.py")
    record = given("work/json.py")
    assert (record.status, record.code, record.fix) == ("broken", "IMPORT", "rename work/json.py")
    assert "a module called 'json' is there already" in record.reason


def test_it_belongs_to_the_process_and_outlives_a_reset_and_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    written("work/plugin_e.py")
    monkeypatch.setattr(context, "_given", [])
    assert context.include("work/plugin_e.py").name == "wip"
    context.reset()
    assert context.catalogue().record("wip").status == "ok"
    child = os.fork()
    if child == 0:
        os._exit(context.catalogue().record("wip").status != "ok")
    assert os.waitpid(child, 0)[1] == 0
    monkeypatch.undo()
    context.reset()


def test_including_it_loads_no_plugin_of_another_name(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tmp_path / "loaded"
    site.install("zeta", f"open({str(loaded)!r}, 'w')" + GOOD)
    written("work/plugin_f.py")
    monkeypatch.setattr(context, "_given", [])
    assert context.include("work/plugin_f.py").status == "ok"
    assert not loaded.exists()
    site.install("wip")  # whose name it takes
    assert context.include("work/plugin_f.py").code == "DUPLICATE"
    monkeypatch.undo()
    context.reset()
