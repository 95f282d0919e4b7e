"""The documentation is true: its code runs, its languages agree, and what is generated is not stale."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(page.read_text(encoding="utf-8")) if name.strip() == language]


def named(language: str) -> list[object]:
    return [
        pytest.param(code, id=f"{page.name}-{n}") for page in PAGES for n, code in enumerate(blocks(page, language), 1)
    ]


@pytest.mark.parametrize("code", named("python"))
def test_every_python_block_runs(code: str, tmp_path: Path) -> None:
    if "from transformers" in code:
        pytest.importorskip("transformers", reason="it needs Python 3.11")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", named("sh"))
def test_every_shell_block_runs(code: str, tmp_path: Path) -> None:
    for line in code.splitlines():
        if line.startswith("python3 ci/run.py"):
            # The two commands set up an environment of their own: CI is itself the run of the second, and
            # tests/test_packaging.py covers what they do. Here, that they exist and take these words.
            done = subprocess.run([sys.executable, str(ROOT / "ci/run.py"), "--help"], capture_output=True, text=True)
            assert line.split()[-1] in done.stdout
            continue
        assert line.startswith("glm5-hal "), f"a shell block may call glm5-hal only: {line}"
        words = [str(tmp_path) if w == "/tmp" else w.replace("/tmp/", f"{tmp_path}/") for w in line.split()[1:]]
        command = [str(Path(sys.executable).parent / "glm5-hal"), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_the_readmes_have_the_same_headings_and_code() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    prose = [BLOCK.sub("", text) for text in (english, chinese)]
    levels, rows, links = (
        [re.findall(pattern, text, re.MULTILINE) for text in prose]
        for pattern in (r"^#+ ", r"^\|.*\|$", r"\]\((?!README)([^)]+)\)")
    )
    assert levels[0] == levels[1]
    assert len(rows[0]) == len(rows[1])
    assert links[0] == links[1]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README_zh.md"], ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_generated_docs_are_not_stale() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "ci/docs.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_option_and_command_of_the_command_line_has_help() -> None:

    import typer.main

    from glm5_hal.cli import app

    def walk(command: Any, path: str) -> None:
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{path} {parameter.name}"
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path} {name}")

    walk(typer.main.get_command(app), "glm5-hal")


def test_the_guides_mention_every_public_name() -> None:
    import glm5_hal

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [name for name in glm5_hal.__all__ if name != "__version__" and name not in text]
    assert not missing
