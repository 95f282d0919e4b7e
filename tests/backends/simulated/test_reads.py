"""The plain-torch kernels leave everything on the device but lengths, and with a step's plan those too."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from machines import with_stand_ins

from glm5_hal.backends import _torch

ROOT = Path(__file__).resolve().parents[3]

#: Ops whose lists of lengths are none of a step's: where experts' rows end, where a prompt's keys do.
WITHOUT_A_PLAN = {"grouped_gemm", "mla_prefill"}

pytestmark = with_stand_ins


@cache
def reads(*args: str) -> dict[str, list[str]]:
    command = [sys.executable, str(ROOT / "ci/simulated/reads.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith(" "):
            found[next(reversed(found))].append(line.strip())
        else:
            found[line] = []
    return found


def test_every_kernel_is_looked_at() -> None:
    assert reads().keys() == {kernel.op for kernel in _torch.kernels()}


@pytest.mark.parametrize("op", sorted({kernel.op for kernel in _torch.kernels()}))
def test_what_leaves_are_lists_of_lengths(op: str) -> None:
    source = (ROOT / "hal/plan.py").read_text(encoding="utf-8").splitlines()
    for read in reads()[op]:
        told = re.fullmatch(r"\d+x copy: aten.copy_.default of \[\d+\], at .*hal/plan.py:(\d+)", read)
        assert told, read
        assert "tolist" in source[int(told[1]) - 1]


def test_with_a_plan_nothing_does_but_lists_that_are_not_the_steps() -> None:
    assert {op for op, seen in reads("--plan").items() if seen} == WITHOUT_A_PLAN
    assert {op for op, seen in reads().items() if seen} > WITHOUT_A_PLAN
