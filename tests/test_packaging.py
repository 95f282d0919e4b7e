"""What is installed, from a wheel and in place: all of it, nothing else, under one import name, and light to import."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import glm5_hal

ROOT = Path(__file__).resolve().parents[1]
#: A backend is a folder.
BUILT_IN = [folder.name for folder in (ROOT / "backends").iterdir() if folder.is_dir() and folder.name[0] != "_"]
FOLDERS = {"hal": "glm5_hal", "ops": "glm5_hal/ops", "backends": "glm5_hal/backends"}
FOLDERS |= {"conformance": "glm5_hal/conformance"}
DERIVED = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", ".*")


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that sees what is installed, and nothing that this process was pointed to."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("GLM5_")}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)


def done(*command: str | Path, cwd: Path | None = None) -> str:
    """The output of a command that succeeds."""
    result = run(*command, cwd=cwd)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pip(*args: str | Path, python: Path | str | None = None) -> str:
    """pip of this environment, for another one where ``python`` is given; without the network."""
    there = ("--python", python) if python else ()
    return done(sys.executable, "-m", "pip", *there, "--disable-pip-version-check", *args)


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a clean copy of the tree: setuptools takes what an earlier build left behind."""
    top = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, top / "tree" / name, ignore=DERIVED)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, top / "tree")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", top, top / "tree")
    (built,) = top.glob("*.whl")
    return built


def test_the_wheel_has_every_file_of_the_four_folders_and_no_other(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and "/." not in path.as_posix()
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected
    for name in ("py.typed", "formats.json", "params/configs/glm-5.json", "backends/_template/pyproject.toml.tmpl"):
        assert f"glm5_hal/{name}" in packed


def test_the_wheel_names_its_license_commands_and_plugins(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        info = {Path(name).name: name for name in packed.namelist() if ".dist-info/" in name}
        points, metadata = (packed.read(info[name]).decode() for name in ("entry_points.txt", "METADATA"))
    assert "LICENSE" in info
    assert "glm5-hal = glm5_hal.cli:main" in points
    assert "cpu = glm5_hal.backends.cpu" in points
    assert "cuda = glm5_hal.backends.cuda" in points
    assert "glm5_hal = glm5_hal.conformance.pytest_plugin" in points
    assert f"Version: {glm5_hal.__version__}\n" in metadata
    requires = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(requires) == ["jinja2", "numpy", "packaging", "pluggy", "rich", "torch", "typer"]


@pytest.fixture(scope="module")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and the example plugin, on this environment's torch and tools.

    A .pth file only lengthens sys.path: this environment's own .pth files, and so its editable install, are not read.
    """
    top = tmp_path_factory.mktemp("venv")
    done(sys.executable, "-m", "venv", "--without-pip", top)
    python = top / "bin/python"
    pip("install", "--no-deps", "--no-index", wheel, python=python)
    site = Path(done(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    plugin = top / "vendor_plugin"
    shutil.copytree(ROOT / "examples/vendor_plugin", plugin, ignore=DERIVED)
    pip("install", "--no-deps", "--no-index", "--no-build-isolation", plugin, python=python)
    return top


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment_works(venv: Path, tmp_path: Path) -> None:
    hal, python = venv / "bin/glm5-hal", venv / "bin/python"
    code = "import glm5_hal, glm5_hal.ops, glm5_hal.backends.cpu, glm5_hal.conformance.cli; print(glm5_hal.__file__)"
    assert Path(done(python, "-c", code, cwd=tmp_path).strip()).is_relative_to(venv)
    assert "new-backend" in done(hal, "--help", cwd=tmp_path)
    assert "new-backend" in done(python, "-m", "glm5_hal", "--help", cwd=tmp_path)
    listed = json.loads(done(hal, "list", "--json", cwd=tmp_path))
    assert {b["name"]: b["status"] for b in listed["backends"]} == dict.fromkeys((*BUILT_IN, "acme"), "ok")
    assert len(listed["ops"]) == len(list((ROOT / "ops").glob("_*.py"))) - 1  # __init__.py
    assert "glm5-hal-fresh" in done(hal, "new-backend", "fresh", cwd=tmp_path)
    assert (tmp_path / "glm5-hal-fresh/src/glm5_hal_fresh/py.typed").exists()


@pytest.mark.slow
def test_the_example_plugin_is_judged_there(venv: Path, tmp_path: Path) -> None:
    hal = venv / "bin/glm5-hal"
    chosen = ("--op", "rms_norm", "--op", "topk_indices")
    found = json.loads(
        done(hal, "conformance", "run", "--backend", "acme", "--level", "smoke", *chosen, "--json", cwd=tmp_path)
    )
    assert found["ok"]
    lines = (tmp_path / "conformance-out/results.jsonl").read_text(encoding="utf-8").splitlines()
    served = {(r["op"], r["kernel"], r["verdict"], r["evidence"]) for r in map(json.loads, lines) if r["kernel"]}
    assert served == {
        ("rms_norm", "acme:native", "PASS", "simulated"),
        ("rms_norm", "acme:torch", "PASS", "simulated"),
        ("topk_indices", "acme:torch", "PASS", "simulated"),
    }
    explained = json.loads(done(hal, "explain", "rms_norm", "--backend", "acme", "--json", cwd=tmp_path))
    assert explained["chosen"] == "acme:native"


@pytest.mark.slow
def test_the_example_plugins_own_tests_pass_there(venv: Path) -> None:
    chosen = ("--hal-level", "smoke", "--hal-op", "rms_norm", "--hal-op", "topk_indices")
    command = (venv / "bin/python", "-m", "pytest", "-p", "no:cacheprovider", "-v", *chosen)
    report = done(*command, cwd=venv / "vendor_plugin")
    assert "[acme:native-rms_norm[bfloat16-tokens]] PASSED" in report
    assert "[acme:native-topk_indices[float32-rows]] SKIPPED" in report, "acme has no such kernel, and says so"
    assert "[acme:torch-topk_indices[float32-rows]] PASSED" in report


# In place


def sources() -> Iterator[Path]:
    for top in ROOT.iterdir():
        if top.is_dir() and not top.name.startswith(".") and top.name not in ("build", "dist"):
            yield from top.rglob("*.py")
    yield from ROOT.glob("*.py")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def test_no_module_imports_a_folder_by_its_bare_name() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources()
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in FOLDERS
    ]
    assert not found


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_refuses_to_be_imported_by_its_bare_name(folder: str) -> None:
    result = run(sys.executable, "-c", f"import {folder}", cwd=ROOT)
    assert result.returncode == 1
    wanted = FOLDERS[folder].replace("/", ".")
    assert result.stderr.splitlines()[-1] == f"ImportError: import {wanted}; the folder's bare name is not a package"


def test_an_editable_install_reads_the_repository(tmp_path: Path) -> None:
    """This environment has one: the README's commands make it."""
    code = "import glm5_hal, glm5_hal.ops as o, glm5_hal.backends as b, glm5_hal.conformance as c\n"
    found = done(sys.executable, "-c", code + "for m in (glm5_hal, o, b, c): print(m.__file__)", cwd=tmp_path)
    assert [Path(line) for line in found.splitlines()] == [ROOT / name / "__init__.py" for name in FOLDERS]


# Light


def loaded(*args: str) -> list[str]:
    """Every module that ``python ARGS`` imports on its way."""
    result = run(sys.executable, "-X", "importtime", *args)
    assert result.returncode == 0, result.stderr
    return [line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")][1:]


@pytest.mark.parametrize(
    "args",
    [
        ["-c", "import glm5_hal"],
        ["-m", "glm5_hal", "--help"],
        ["-m", "glm5_hal", "conformance", "--help"],
        ["-m", "glm5_hal", "params", "glm-5", "--json"],
    ],
    ids=lambda args: " ".join(args),
)
def test_no_torch_is_loaded_for(args: Sequence[str]) -> None:
    modules = loaded(*args)
    assert "glm5_hal" in modules
    assert not [name for name in modules if name.split(".")[0] in ("torch", "numpy")]


def test_importing_it_costs_a_handful_of_modules() -> None:
    bare = set(loaded("-c", "pass"))
    assert len(set(loaded("-c", "import glm5_hal")) - bare) <= 12


def test_every_public_name_is_there_and_nothing_else_is() -> None:
    for name in glm5_hal.__all__:
        assert getattr(glm5_hal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        glm5_hal.nonsense  # noqa: B018
