"""mypy --strict over the packages and the example plugin; the exit code is mypy's.

    python ci/typecheck.py [further arguments of mypy]

Type checkers do not see setuptools' folder mapping in a plain editable install, so the packages are laid out for them
in a temporary folder of links.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples/vendor_plugin/src/glm5_hal_acme"
PREFIX = "glm5-hal-types-"


def link(tree: Path) -> None:
    """Lay out ``tree`` so that each import name is a path below it."""
    package = tree / "glm5_hal"
    package.mkdir()
    for source in [*(ROOT / "hal").iterdir(), *(ROOT / name for name in ("ops", "backends", "conformance"))]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    (tree / EXAMPLE.name).symlink_to(EXAMPLE)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        link(Path(folder))
        command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
        command += [*sys.argv[1:], "-p", "glm5_hal", "-p", EXAMPLE.name]
        env = {**os.environ, "MYPYPATH": folder}
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(in_repository(done.stdout), end="")
    return done.returncode


def in_repository(text: str) -> str:
    """mypy's report, with paths as the repository has them. Its cache remembers the folders of earlier runs too."""
    text = re.sub(rf"\S*/{PREFIX}\w+/", "", text)
    text = re.sub(r"^glm5_hal/(ops|backends|conformance)/", r"\1/", text, flags=re.MULTILINE)
    text = re.sub(r"^glm5_hal/", "hal/", text, flags=re.MULTILINE)
    return re.sub(rf"^{EXAMPLE.name}/", f"{EXAMPLE.relative_to(ROOT)}/", text, flags=re.MULTILINE)


if __name__ == "__main__":
    raise SystemExit(main())
