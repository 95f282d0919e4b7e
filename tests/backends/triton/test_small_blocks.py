"""Every Triton kernel with so small blocks that each of its loops over tiles, parts or blocks runs several times, and
with every argument between pages that cannot be touched: the interpreter itself does not see a read out of bounds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from glm5_hal.ops import specs

pytest.importorskip("triton")

PROGRAM = Path(__file__).resolve().parents[2] / "helpers/small_blocks.py"

#: Ops that their parts serve.
COMPOSED = ("indexer_prolog", "mla_prolog")
KERNELS = [
    *((op, "triton") for op in specs() if op not in COMPOSED),
    ("mla_decode", "triton-invariant"),
    ("sparse_mla", "triton-invariant"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "provider"), KERNELS)
def test_the_smoke_samples_come_out_right(op: str, provider: str) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), op, provider], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("place", "there"), [(0, True), (88, True), (92, False), (-4096, False)])
def test_what_is_out_of_bounds_cannot_be_read(place: int, there: bool) -> None:
    program = f"""
import ctypes, torch
from fences import fenced
x = fenced(torch.arange(24.0).view(4, 6)[:, ::2])
assert x.stride() == (6, 2) and x.flatten().tolist() == list(range(0, 24, 2))
ctypes.c_float.from_address(x.data_ptr() + {place}).value
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PROGRAM.parent)
    assert (done.returncode == 0) == there, done.stderr
    assert done.returncode <= 0, done.stderr
