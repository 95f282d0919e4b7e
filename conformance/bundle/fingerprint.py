"""Which suite judged, and by which semantics: hashes that two parties can compare."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import importlib.util
import io
import os
import subprocess
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import glm5_hal

PACKAGES = ("glm5_hal", "glm5_hal.ops", "glm5_hal.backends", "glm5_hal.conformance")
DISTRIBUTION = "glm5-hal"


@dataclass(frozen=True)
class Suite:
    """The code that judged.

    Attributes:
        version: of the distribution.
        origin: "git" for a checkout, "wheel" for an installed distribution, "unknown" for anything else.
        commit: the checkout's, "" elsewhere.
        clean: nothing differs from the commit, or from what the wheel's record lists.
        code: sha256 over all files of the four packages; the same from a checkout and from its wheel.
    """

    version: str
    origin: str
    commit: str
    clean: bool
    code: str


@cache
def suite() -> Suite:
    """The suite that is running."""
    files = {name: path for package in PACKAGES for name, path in files_of(package).items()}
    origin, commit, clean = _checkout() or _wheel(files) or ("unknown", "", False)
    return Suite(glm5_hal.__version__, origin, commit, clean, hashed(files))


@cache
def spec_hashes() -> Mapping[str, str]:
    """One hash per op, over its declaration, its reference, its samples and the helpers that ops share: everything in
    the source but docstrings, comments and blank lines."""
    from glm5_hal import formats
    from glm5_hal.ops import names

    ops = Path(importlib.import_module("glm5_hal.ops").__path__[0])
    shared = hashlib.sha256(Path(formats.__file__).with_name("formats.json").read_bytes())
    for path in sorted((ops / "_common").glob("*.py")):
        shared.update(f"{path.name}\n{essence(path.read_text(encoding='utf-8'))}".encode())
    found = {}
    for name in names():
        own = shared.copy()
        own.update(essence((ops / f"_{name}.py").read_text(encoding="utf-8")).encode())
        found[name] = own.hexdigest()
    return found


def combined(hashes: Mapping[str, str]) -> str:
    """One hash for all: the spec hash."""
    return listed(f"{name} {value}" for name, value in sorted(hashes.items()))


def listed(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def essence(source: str) -> str:
    """Source text without docstrings, comments and blank lines.

    Taken from the text, not from a printed syntax tree, whose form differs from one Python to the next.
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            text = node.body[0]
            assert text.end_lineno is not None
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1]:
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def files_of(module: str) -> dict[str, Path]:
    """Every file of a package by its import path, whatever folder it lies in; a module's own. What is hidden belongs to
    an editor, and what is cached to Python."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return {}
    if not spec.submodule_search_locations:
        return {module.replace(".", "/"): Path(spec.origin)} if spec.origin else {}
    found = {}
    for top in map(Path, spec.submodule_search_locations):
        for path in top.rglob("*"):
            inner = path.relative_to(top)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inner.parts)
            if path.is_file() and not hidden:
                found[f"{module.replace('.', '/')}/{inner.as_posix()}"] = path
    return found


def hashed(files: Mapping[str, Path]) -> str:
    """SHA-256 over names and contents."""
    return listed(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in sorted(files.items()))


def _checkout() -> tuple[str, str, bool] | None:
    folders = [str(Path(importlib.import_module(package).__path__[0])) for package in PACKAGES]
    top = _git(folders[0], "rev-parse", "--show-toplevel")
    # An environment inside a checkout is ignored by it, and its packages are none of its files.
    if top is None or _git(folders[0], "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folders[0], "rev-parse", "HEAD")
    changes = _git(top, "status", "--porcelain", "--untracked-files=all", "--", *folders)
    return None if commit is None else ("git", commit, changes == "")


def _git(folder: str, *words: str) -> str | None:
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=20, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _wheel(files: Mapping[str, Path]) -> tuple[str, str, bool] | None:
    """An installed distribution vouches for its files by the hashes in its record."""
    try:
        recorded = metadata.distribution(DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        return None
    hashes = {f.as_posix(): f.hash.value for f in recorded if f.hash and f.hash.mode == "sha256"}
    mine = {name: value for name, value in hashes.items() if name.split("/")[0] == PACKAGES[0]}
    if not mine:
        return None
    actual = {name: _record_hash(path) for name, path in files.items()}
    return "wheel", "", actual == mine


def _record_hash(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
