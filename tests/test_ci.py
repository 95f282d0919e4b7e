"""`ci/run.py` makes its environment, runs every step, and says what to do where one fails."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def ci_run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "ci/run.py"), *args], capture_output=True, text=True)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, list[str]]:
    """ci/run.py for a repository in ``tmp_path``, and the commands that it would have run."""
    spec = importlib.util.spec_from_file_location("ci_run", ROOT / "ci/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    commands: list[str] = []

    def fake(command: list[str]) -> int:
        commands.append(" ".join(command))
        return module.answers.get(next((word for word in module.answers if word in commands[-1]), ""), 0)

    (tmp_path / ".venv").mkdir()
    (tmp_path / "ci").mkdir()
    for name in module.REQUIREMENTS:
        (tmp_path / name).write_text("1")
    for name, value in {"ROOT": tmp_path, "VENV": tmp_path / ".venv", "run": fake, "works": lambda: True}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "answers", {}, raising=False)
    return module, commands


def test_the_environment_is_brought_up_to_date_when_the_requirements_change(job: tuple[ModuleType, list[str]]) -> None:
    module, commands = job
    module.prepare()
    module.prepare()
    assert len(commands) == 1
    assert "pip install" in commands[0]
    (module.ROOT / "ci/constraints.txt").write_text("2")
    module.prepare()
    assert len(commands) == 2


def test_an_installation_that_fails_is_tried_again_and_says_how(job: tuple[ModuleType, list[str]]) -> None:
    module, commands = job
    module.answers["pip install"] = 1
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"could not be installed\n  retry: cd .* -m pip install"):
            module.prepare()
    assert len(commands) == 2


def test_no_virtual_environment_is_an_error_with_a_fix(
    job: tuple[ModuleType, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, commands = job
    monkeypatch.setattr(module, "works", lambda: False)
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        module.prepare()
    assert len(commands) == 1
    assert "-m venv" in commands[0]


def test_every_step_runs_and_a_failure_is_the_exit_code(
    job: tuple[ModuleType, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, commands = job
    monkeypatch.setattr(sys, "argv", ["run.py", "test"])
    module.answers["ruff check"] = 3
    assert module.main() == 3
    assert commands[-1].endswith("-m pytest"), "its closing line is the run's"
    assert "failed: " in capsys.readouterr().out
    module.answers.clear()
    assert module.main() == 0
    assert not capsys.readouterr().out


def test_every_job_explains_itself_and_an_unknown_one_is_a_usage_error() -> None:
    shown = ci_run("--help").stdout
    assert all(name in shown for name in ("conformance", "lint", "test"))
    assert ci_run("deploy").returncode == 2


def test_ci_runs_the_readmes_second_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 ci/run\.py \w+$", readme, re.MULTILINE)
    assert commands == ["python3 ci/run.py conformance", "python3 ci/run.py test"]
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == f"exec {commands[1]}"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_every_requirement_is_pinned_for_ci() -> None:
    """Of the base and the test extra; the other extras are for hosts with that hardware."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = [
        text[text.index("\ndependencies = [") :].splitlines()[1],
        re.search(r"^test = .*$", text, re.MULTILINE)[0],
    ]
    names = re.findall(r'"([\w-]+)[><=]', " ".join(needed))
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "ci/constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(names) - set(pinned) == set()
