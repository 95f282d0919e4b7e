"""Every job of this repository, in an environment that it makes itself.

    python3 ci/run.py conformance    the conformance suite on the built-in CPU backend at GLM-5's real widths
    python3 ci/run.py selftest       every mutant and every honest kernel through the suite
    python3 ci/run.py interpret      every Triton kernel through the suite, in Triton's interpreter
    python3 ci/run.py triton-compile every Triton kernel compiled for chips that are not here, within its budgets
    python3 ci/run.py triton-ascend  every Triton kernel lowered by Ascend's front end
    python3 ci/run.py ascend         Ascend's adapters: the vendor's own torch_npu, then the suite over emulated ops
    python3 ci/run.py simulated      every vendor's backend through the suite on a stand-in of its device
    python3 ci/run.py lint           ruff, mypy, and the lint of the Triton kernels
    python3 ci/run.py test           lint, docs freshness and all tests: what CI runs

The environment is .venv in the repository. It is made on first use and brought up to date when the project's
requirements change. Python 3.10 or newer is all that is needed.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - this file is what an older Python is told by
    sys.exit("error: Python 3.10 or newer is needed, this is {}.{}".format(*sys.version_info))

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = str(BIN / "python")

SUITE = "conformance run --backend cpu --level standard --out conformance-out"
INTERPRETED = (
    "conformance run --plugin ci/triton_interpreter.py --level smoke --workers 2 --timeout 600 --out conformance-triton"
)
VENDORS = ("cuda", "ascend", "musa", "hygon", "cambricon", "kunlunxin", "metax", "enflame")
SIMULATED = "conformance run --plugin ci/simulated/{0}_simulated.py --level smoke --out conformance-simulated/{0}"
LINT = [
    [PYTHON, "-m", "ruff", "check", "."],
    [PYTHON, "-m", "ruff", "format", "--check", "."],
    [PYTHON, "ci/typecheck.py"],
    [PYTHON, "ci/triton_api.py"],
]
JOBS = {
    "conformance": [[str(BIN / "glm5-hal"), *SUITE.split()]],
    "selftest": [[str(BIN / "glm5-hal"), "conformance", "selftest"]],
    "interpret": [[str(BIN / "glm5-hal"), *INTERPRETED.split()]],
    "triton-compile": [[PYTHON, "ci/triton_compile.py"]],
    "triton-ascend": [[PYTHON, "ci/triton_ascend.py"]],
    "ascend": [[PYTHON, "ci/ascend/contract.py"], [PYTHON, "-m", "pytest", "tests/backends/ascend/test_emulated.py"]],
    "simulated": [[str(BIN / "glm5-hal"), *SIMULATED.format(vendor).split()] for vendor in VENDORS],
    "lint": LINT,
    # pytest comes last: its closing line is the run's.
    "test": [*LINT, [PYTHON, "ci/docs.py", "--check"], [PYTHON, "ci/waivers.py"], [PYTHON, "-m", "pytest"]],
}

#: What the environment follows from, beside this repository's place.
REQUIREMENTS = ("pyproject.toml", "setup.py", "ci/constraints.txt")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=JOBS)
    job = JOBS[parser.parse_args().job]
    prepare()
    codes = {shown(command): run(command) for command in job}
    failed = {command: code for command, code in codes.items() if code}
    if len(job) > 1:
        print("".join(f"failed: {command}\n" for command in failed), end="", flush=True)
    return next(iter(failed.values()), 0)


def prepare() -> None:
    """Make .venv, or bring it up to date. What was interrupted is taken up again by the next run."""
    wanted = hashlib.sha256(str(ROOT).encode() + b"".join((ROOT / name).read_bytes() for name in REQUIREMENTS))
    stamp = VENV / "glm5-hal.sha256"
    if works() and stamp.exists() and stamp.read_text() == wanted.hexdigest():
        return
    make = [sys.executable, "-m", "venv", str(VENV)]
    if not works() and (run(make) or not works()):
        fail("no virtual environment: apt install python3-venv, or remove a .venv that is broken", make)
    install = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check"]
    install += ["-c", "ci/constraints.txt", "-e", ".[test]"]
    if run(install):
        fail("the requirements could not be installed", install)
    stamp.write_text(wanted.hexdigest())


def works() -> bool:
    """Whether .venv has a Python that runs and has pip."""
    try:
        return not subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode
    except OSError:
        return False


def run(command: list[str]) -> int:
    print(f"$ {shown(command)}", flush=True)
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode


def fail(what: str, command: list[str]) -> None:
    sys.exit(f"error: {what}\n  retry: cd {shlex.quote(str(ROOT))} && {shown(command)}")


def shown(command: list[str]) -> str:
    return shlex.join(part.removeprefix(f"{ROOT}{os.sep}") for part in command)


if __name__ == "__main__":
    raise SystemExit(main())
