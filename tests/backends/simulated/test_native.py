"""Adapters of vendors' libraries make everything on the device: judged on a stand-in of it, by every check.

On CPU tensors, where tests/backends/VENDOR judge them in full, a tensor that was made on the host is not seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from machines import with_stand_ins

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("native.py")

#: What each vendor's kernels of these libraries are.
KERNELS = {
    "musa": {"grouped_gemm mate", "sparse_mla mate"},
    "cambricon": {
        "rms_norm tmo", "add_rms_norm tmo", "silu_and_mul tmo", "mla_cache_write tmo", "index_cache_write tmo",
        "mla_decode tmo", "sparse_mla tmo", "moe_route tmo", "grouped_gemm tmo",
    },
    "kunlunxin": {"rms_norm kunlun_ops", "add_rms_norm kunlun_ops", "silu_and_mul kunlun_ops"},
    "hygon": {"sparse_mla flash_mla"},
    "metax": {"sparse_mla flash_mla", "mla_decode flash_mla"},
}  # fmt: skip

pytestmark = [pytest.mark.slow, with_stand_ins]


@cache
def judged(vendor: str) -> dict[str, dict[str, tuple[str, str]]]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("ci", "tests/helpers", "tests/backends"))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(PROGRAM), vendor], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, tuple[str, str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("vendor", KERNELS)
def test_every_adapter_is_tried(vendor: str) -> None:
    assert KERNELS[vendor] <= judged(vendor).keys()


@pytest.mark.parametrize(("vendor", "kernel"), [(v, k) for v, kernels in KERNELS.items() for k in sorted(kernels)])
def test_it_passes_a_case_that_it_takes(vendor: str, kernel: str) -> None:
    results = judged(vendor)[kernel]
    assert results
    assert {case: verdict for case, (verdict, _) in results.items()} == dict.fromkeys(results, "PASS"), results
