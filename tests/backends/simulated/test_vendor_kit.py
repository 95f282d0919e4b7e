"""docs/vendor-kit.md, walked through from its first command to its last, in one folder, as its reader would."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from machines import with_stand_ins

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/vendor-kit.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) (\S+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)

pytestmark = [pytest.mark.slow, with_stand_ins]


class Reader:
    """Who follows the guide: where they are, and what they have installed."""

    def __init__(self, folder: Path) -> None:
        self.here, self.site, self.shown = folder, folder / "site", dict[str, str]()
        self.site.mkdir()
        scripts = str(Path(sys.executable).parent)
        self.env = {**os.environ, "PYTHONPATH": str(self.site), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}

    def write(self, name: str, text: str) -> None:
        today = datetime.datetime.now(tz=datetime.timezone.utc).date()
        text = text.replace("2030-01-01", str(today)).replace("2030-03-31", str(today + datetime.timedelta(days=80)))
        file = self.here / name
        assert name == "simulated_acme.py" or file.exists(), f"{name} is no file of the package"
        file.write_text(text.replace("/path/to/glm5-hal", str(ROOT)), encoding="utf-8")

    def run(self, line: str) -> None:
        command, _, comment = line.partition("  # ")
        words = shlex.split(command)
        if words[0] == "cd":
            self.here /= words[1]
        elif words[:2] == ["pip", "install"]:
            self.install()
        else:
            done = subprocess.run(self.program(words), cwd=self.here, env=self.env, capture_output=True, text=True)
            wanted = int(comment.removeprefix("exit code ")) if comment else 0
            self.shown[command] = said = done.stdout + done.stderr
            if "verify" in words and done.returncode == 4:  # of a suite that is being worked on
                assert set(re.findall(r"^([A-Z]{4,})  ", said, re.MULTILINE)) == {"DIRTY"}, said
            else:
                assert done.returncode == wanted, f"{line}\n{said}"

    def program(self, words: list[str]) -> list[str]:
        return [sys.executable, *words[1:]] if words[0] == "python" else words

    def install(self) -> None:
        """As `pip install -e` does, which needs a network."""
        package = (self.here / "pyproject.toml").read_text(encoding="utf-8")
        point = re.search(r'^\[project.entry-points."glm5_hal.backends"\]\n(\w+) = "(\w+)"', package, re.MULTILINE)
        assert point is not None
        about = self.site / "glm5_hal_acme-0.1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: glm5-hal-acme\nVersion: 0.1.0\n")
        (about / "entry_points.txt").write_text(f"[glm5_hal.backends]\n{point[1]} = {point[2]}\n")
        self.env["PYTHONPATH"] += f"{os.pathsep}{self.here / 'src'}"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What every command of the guide printed."""
    reader, kernels = Reader(tmp_path_factory.mktemp("afternoon")), ""
    for _, label, code in BLOCKS:
        if label == "session":
            for line in code.splitlines():
                reader.run(line)
        elif label != "notest":
            kernels = kernels or (code if label.endswith("kernels.py") else "")
            reader.write(label, code)
        if "There are none" in code:  # "write the kernel of step 2 again"
            reader.write("src/glm5_hal_acme/kernels.py", kernels)
    found = dict(reader.shown)
    found["results of broken"] = (reader.here / "broken/results.jsonl").read_text(encoding="utf-8")
    return found


def test_every_command_does_what_the_guide_says(shown: dict[str, str]) -> None:
    assert len(shown) > 15


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("glm5-hal explain silu_and_mul --backend acme", r"\* acme:native +accepted"),
        ("glm5-hal explain silu_and_mul D2=20 --backend acme", r"\* acme:torch +accepted"),
        ("glm5-hal conformance run --backend acme:native --op silu_and_mul --out first", "22 UNSUPPORTED, 16 PASS"),
        ("glm5-hal conformance run --backend acme:native --op silu_and_mul --out waived", "7 XFAIL"),
        ("glm5-hal doctor", "pip install torch-acme"),
    ],
)
def test_and_shows_what_it_says(shown: dict[str, str], command: str, said: str) -> None:
    assert re.search(said, shown[command]), shown[command]


def test_the_command_of_a_failing_case_is_the_one_that_the_guide_runs(shown: dict[str, str]) -> None:
    results = [json.loads(line) for line in shown["results of broken"].splitlines()]
    assert any(f"{r['repro']} --out one" in shown for r in results if r["verdict"] == "FAIL")
