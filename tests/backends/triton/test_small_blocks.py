"""Every Triton kernel with so small blocks that each of its loops over tiles, parts or blocks runs several times."""

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
