"""The stand-in device does what it says: each check runs in a process whose device it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from machines import with_stand_ins

CHECKS = Path(__file__).with_name("checks.py")
NAMES = re.findall(r"^def (?!main)(\w+)\(\) -> None:", CHECKS.read_text(encoding="utf-8"), re.MULTILINE)

pytestmark = with_stand_ins


@cache
def said(device: str) -> dict[str, str]:
    done = subprocess.run([sys.executable, str(CHECKS), device], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("device", ["musa", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_stand_in(device: str, name: str) -> None:
    assert not said(device)[name], said(device)[name]
