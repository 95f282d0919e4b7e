"""`glm5-hal new-backend NAME` writes a whole working package, or says why not and writes nothing."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import glm5_hal
from glm5_hal import context, dispatch, plugins, scaffold
from glm5_hal.catalogue import Catalogue
from glm5_hal.conformance import cases, runner
from glm5_hal.conformance.target import targets
from glm5_hal.errors import HalError
from glm5_hal.plugins import PluginRecord

ROOT = Path(__file__).resolve().parents[2]
LONGEST = "a" * 39 + "z"


def record(name: str, *, builtin: bool = False, status: str = "ok") -> PluginRecord:
    dist = "glm5-hal" if builtin else f"vendor-{name}"
    return PluginRecord(name, "module", dist, "1.2", builtin=builtin, status=status)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as installed, whatever this machine has."""
    records = [record("cpu", builtin=True), record("my-chip"), record("sick", status="broken")]
    monkeypatch.setattr(context._process, "catalogue", Catalogue(records))


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def python(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run this Python, with the folder ``path`` before everything that is installed."""
    folders = [str(path or ""), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)


# What is written


def test_it_writes_a_package(tmp_path: Path) -> None:
    made = scaffold.write("acme", tmp_path)
    assert made.folder == tmp_path / "glm5-hal-acme"
    assert [path.relative_to(made.folder).as_posix() for path in made.files] == [
        "README.md",
        "pyproject.toml",
        "src/glm5_hal_acme/__init__.py",
        "src/glm5_hal_acme/kernels.py",
        "src/glm5_hal_acme/py.typed",
        "src/glm5_hal_acme/waivers.toml",
        "tests/test_conformance.py",
    ]
    assert all(path.is_file() for path in made.files)
    assert os.listdir(tmp_path) == ["glm5-hal-acme"], "nothing is left of the making"
    assert str(made.folder) in made.next_steps


def test_the_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    assert scaffold.write("acme", tmp_path).folder.stat().st_mode == beside.stat().st_mode


def test_a_name_with_a_dash_has_a_module_with_an_underscore() -> None:
    files = scaffold.rendered("two-words")
    assert "src/glm5_hal_two_words/__init__.py" in files
    assert 'name="two-words"' in files["src/glm5_hal_two_words/__init__.py"]
    assert 'two-words = "glm5_hal_two_words"' in files["pyproject.toml"]
    assert 'name = "glm5-hal-two-words"' in files["pyproject.toml"]


@pytest.mark.parametrize("name", ["a", "acme", "class", "a-b_c", "x9", LONGEST])
def test_no_placeholder_is_left(name: str) -> None:
    for path, text in scaffold.rendered(name).items():
        assert "NAME" not in path + text
        assert "MODULE" not in path + text


@pytest.mark.parametrize("name", ["a", "class", "a-b_c", LONGEST])
def test_what_is_written_is_clean(name: str, tmp_path: Path) -> None:
    folder = scaffold.write(name, tmp_path).folder
    for check in (["check"], ["format", "--check"]):
        done = python("-m", "ruff", *check, "--no-cache", ".", cwd=folder)
        assert done.returncode == 0, done.stdout


def test_the_committed_example_is_what_is_written_today() -> None:
    example = ROOT / "examples/vendor_plugin"
    derived = re.compile(r"(^|/)(\.|__pycache__/|build/|\w+\.egg-info/)")
    committed = {
        path.relative_to(example).as_posix(): path.read_text(encoding="utf-8")
        for path in example.rglob("*")
        if path.is_file() and not derived.search(path.relative_to(example).as_posix())
    }
    assert committed == scaffold.rendered("acme")


# It works


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scaffold.write("fresh-chip", tmp_path_factory.mktemp("scaffold")).folder


@pytest.fixture
def plugged(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The generated package as the only installed plugin."""
    monkeypatch.syspath_prepend(fresh / "src")
    point = metadata.EntryPoint("fresh-chip", "glm5_hal_fresh_chip", "glm5_hal.backends")
    monkeypatch.setattr(context._process, "catalogue", Catalogue(plugins.find([point])))
    dispatch.clear_tables()
    yield
    dispatch.clear_tables()
    for name in [name for name in sys.modules if name.startswith("glm5_hal_fresh_chip")]:
        del sys.modules[name]


@pytest.mark.usefixtures("plugged")
def test_its_own_kernel_serves_its_op_and_the_shared_ones_serve_the_rest() -> None:
    with glm5_hal.use("fresh-chip"):
        chosen = {op: glm5_hal.explain(op).as_dict()["chosen"] for op in ("rms_norm", "topk_indices")}
    assert chosen == {"rms_norm": "fresh-chip:native", "topk_indices": "fresh-chip:torch"}


@pytest.mark.usefixtures("plugged")
def test_what_its_kernel_does_not_take_is_refused_as_data() -> None:
    with glm5_hal.use("fresh-chip:native"):
        found = glm5_hal.explain("rms_norm", dtype="float64")
    assert not found.ok
    assert "DTYPE" in str(found)


@pytest.mark.usefixtures("plugged")
def test_it_conforms_and_calls_itself_simulated() -> None:
    results = list(runner.run(list(cases.cases("smoke", ["rms_norm"])), targets("fresh-chip"), seed=0))
    assert {r.verdict for r in results} == {"PASS"}
    assert {r.kernel for r in results} == {"fresh-chip:native", "fresh-chip:torch"}
    assert {r.evidence for r in results} == {"simulated"}


@pytest.mark.usefixtures("plugged")
def test_asking_twice_gives_the_same_backend() -> None:
    """Importing a package's submodule sets its name in the package: a hook called again must not trip over it."""
    module = importlib.import_module("glm5_hal_fresh_chip")
    first, second = (len(module.glm5_backend().kernels()) for _ in range(2))
    assert first == second > 1


def test_its_own_tests_judge_it_without_being_told(fresh: Path) -> None:
    """As if installed: the metadata of a wheel lies beside its modules."""
    info = fresh / "src/glm5_hal_fresh_chip-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: glm5-hal-fresh-chip\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[glm5_hal.backends]\nfresh-chip = glm5_hal_fresh_chip\n")
    args = ("-p", "no:cacheprovider", "--hal-op", "rms_norm", "-v")
    done = python("-m", "pytest", *args, cwd=fresh, path=fresh / "src")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[fresh-chip:native-rms_norm[" in done.stdout
    assert "[cpu:" not in done.stdout


# What is refused


MALFORMED = ["", " ", "Acme", "9chips", "-acme", "_acme", "acme-", "acme_", "ac me", "ac.me", "a/b", "../acme", "acmé"]
MISLEADING = ["auto", "NAME", "a:b", "a=b", "a\n", "a" * 41]


@pytest.mark.parametrize("name", MALFORMED + MISLEADING)
def test_a_name_that_cannot_be_used_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(HalError, match="cannot be the name") as refusal:
        scaffold.write(name, tmp_path)
    assert (refusal.value.code, refusal.value.value) == ("CONFIG", name)
    assert refusal.value.fix
    assert not everything_in(tmp_path)


@pytest.mark.parametrize(
    ("name", "near"), [("Acme Chip", "acme-chip"), ("9x", "x"), ("acme_", "acme"), ("a" * 50, "a" * 40)]
)
def test_a_usable_name_is_proposed(name: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(HalError) as refusal:
        scaffold.write(name, tmp_path)
    assert repr(near) in refusal.value.fix


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("cpu", "a built-in backend"),
        ("my-chip", "an installed plugin, from vendor-my-chip 1.2"),
        ("my_chip", "an installed plugin"),  # the same module and the same distribution
        ("sick", "an installed plugin"),  # broken today, but there
    ],
)
def test_a_name_that_is_taken_is_refused(name: str, who: str, tmp_path: Path) -> None:
    with pytest.raises(HalError, match=who) as refusal:
        scaffold.write(name, tmp_path)
    assert refusal.value.code == "CONFIG"
    assert "another name" in refusal.value.fix
    assert not everything_in(tmp_path)


def test_a_name_that_a_given_plugin_has_is_free_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = PluginRecord("mine", "mine", "", "", builtin=False, given="work/mine.py")
    monkeypatch.setattr(context._process, "catalogue", Catalogue([taken]))
    with pytest.raises(HalError, match=r"an installed plugin, from plugin work/mine\.py") as refusal:
        scaffold.write("mine", tmp_path)
    assert refusal.value.fix == "choose another name, or: leave out --plugin work/mine.py"


def test_a_module_that_would_be_hidden_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "glm5_hal_there.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(HalError, match="glm5_hal_there can be imported already"):
        scaffold.write("there", out)
    assert not everything_in(out)


@pytest.mark.parametrize("kind", ["full folder", "empty folder", "file", "dangling link"])
def test_nothing_is_ever_overwritten(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "glm5-hal-acme"
    if kind == "file":
        folder.write_text("mine")
    elif kind == "dangling link":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        folder.mkdir()
        if kind == "full folder":
            (folder / "work.py").write_text("mine")
    before = everything_in(tmp_path)
    with pytest.raises(HalError, match="exists already") as refusal:
        scaffold.write("acme", tmp_path)
    assert (refusal.value.code, refusal.value.value) == ("CONFIG", str(folder))
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("out", ["missing", "file", "file/below"])
def test_an_out_that_is_no_folder_is_refused(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HalError, match="is not a folder") as refusal:
        scaffold.write("acme", tmp_path / out)
    assert "mkdir -p" in refusal.value.fix
    assert everything_in(tmp_path) == ["file"]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(self: Path, *args: object, **kwargs: object) -> int:
        written.append(self)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return self.write_bytes(b"")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(HalError, match="No space left on device") as refusal:
        scaffold.write("acme", tmp_path)
    assert refusal.value.code == "CONFIG"
    assert not everything_in(tmp_path)


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", forbidden)  # chmod would not stop root
    with pytest.raises(HalError, match="Permission denied"):
        scaffold.write("acme", tmp_path)


# The command


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    done = python("-m", "glm5_hal", "new-backend", "brand-new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "conformance run --backend brand-new" in done.stdout
    again = python("-m", "glm5_hal", "new-backend", "brand-new", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "exists already" in again.stderr
    assert "fix:" in again.stderr


def test_the_command_answers_in_json(tmp_path: Path) -> None:
    done = python("-m", "glm5_hal", "new-backend", "brand-new", "--out", str(tmp_path), "--json", cwd=tmp_path)
    made = json.loads(done.stdout)
    assert Path(made["folder"]) == tmp_path / "glm5-hal-brand-new"
    assert all(Path(path).is_file() for path in made["files"])
