"""mypy --strict over the packages and the example plugin; the exit code is mypy's.

    python ci/typecheck.py [further arguments of mypy]

Type checkers do not see setuptools' folder mapping in a plain editable install, so the packages are laid out for them
in a temporary folder of links.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/vendor_plugin/src/glm5_hal_acme"


def link(tree: Path) -> None:
    """Lay out ``tree`` so that each import name is a path below it."""
    package = tree / "glm5_hal"
    package.mkdir(parents=True)
    for source in [*(ROOT / "hal").iterdir(), *(ROOT / name for name in ("ops", "backends", "conformance"))]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    (tree / EXAMPLE.name).symlink_to(EXAMPLE)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        link(tree)
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
        command += [*sys.argv[1:], "-p", "glm5_hal", "-p", EXAMPLE.name]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "MYPYPATH": str(tree)}, stdout=subprocess.PIPE, text=True
        )
        print(in_repository(done.stdout, tree), end="")
    return done.returncode


def in_repository(text: str, tree: Path) -> str:
    """mypy's report, with paths as the repository has them."""
    prefix = os.path.relpath(tree, ROOT)
    for shown in (str(tree), prefix):
        for name in ("ops", "backends", "conformance"):
            text = text.replace(f"{shown}/glm5_hal/{name}/", f"{name}/")
        text = text.replace(f"{shown}/glm5_hal/", "hal/")
        text = text.replace(f"{shown}/{EXAMPLE.name}/", f"{EXAMPLE.relative_to(ROOT)}/")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
