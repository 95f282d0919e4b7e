"""Lower every Triton kernel with Ascend's front end, to TTIR and to linalg: as far as a machine without CANN goes.

    python ci/triton_ascend.py [the options of ci/triton_compile.py]

triton-ascend is Triton 3.2 with a compiler of its own, under the same module name. It is installed into
``build/triton-ascend`` and comes before the other one in this job's processes only. That a kernel is lowered does not
say that it fits the chip's memory, nor that it runs: evidence "compiled". Exit codes: 0 every kernel is lowered, or
``triton_ascend.toml`` says why not; 1 one is not; 2 usage; 3 triton-ascend cannot be installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build/triton-ascend"
#: It imports pybind11, and does not ask for it.
PACKAGES = ("triton-ascend==3.2.0", "pybind11==3.1.0")


def main() -> int:
    if not installed():
        print("error: triton-ascend cannot be installed: is the package index reached?", file=sys.stderr)
        return 3
    command = [sys.executable, str(ROOT / "ci/triton_compile.py"), "--budgets", str(ROOT / "ci/triton_ascend.toml")]
    env = {**os.environ, "PYTHONPATH": str(PLACE), "TRITON_ALWAYS_COMPILE": "1"}
    return subprocess.run([*command, *sys.argv[1:]], env=env).returncode


def installed() -> bool:
    stamp = PLACE / "glm5-hal.txt"
    if stamp.exists() and stamp.read_text() == " ".join(PACKAGES):
        return True
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(PLACE), *PACKAGES]
    if subprocess.run(install, stdout=sys.stderr).returncode:
        return False
    stamp.write_text(" ".join(PACKAGES))
    return True


if __name__ == "__main__":
    raise SystemExit(main())
