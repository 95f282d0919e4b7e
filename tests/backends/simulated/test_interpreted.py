"""Each vendor's tuning file gives Triton kernels that are right: a few cases of every family, interpreted.

The numbers of a vendor's own compiler are not seen here; that a kernel uses no type that the compiler lacks is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from glm5_hal.backends._triton.tuning import Tuning, tuning

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("interpreted.py")
VENDORS = ("cuda", "ascend", "musa", "hygon", "cambricon", "kunlunxin", "metax", "enflame")


@cache
def judged() -> dict[str, dict[str, dict[str, Any]]]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("ci", "tests/helpers"))
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(PROGRAM), *VENDORS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(done.stdout)
    return found


def tuned(vendor: str) -> Tuning:
    return tuning("any", import_module(f"glm5_hal.backends.{vendor}").TUNING)


@pytest.mark.parametrize("vendor", VENDORS)
def test_its_kernels_bind_and_pass(vendor: str) -> None:
    for case, said in judged()[vendor].items():
        wanted = "PASS" if "float64" not in case or "float64" in tuned(vendor).floats else "UNSUPPORTED"
        assert said["verdict"] == wanted, (case, said)


@pytest.mark.parametrize("vendor", VENDORS)
def test_in_other_dtypes_nothing_is_computed_in_float64(vendor: str) -> None:
    wide = {case for case, said in judged()[vendor].items() if "fp64" in said["wide"]}
    assert wide <= {"rms_norm[float64-tokens]"}


@pytest.mark.parametrize("vendor", [vendor for vendor in VENDORS if not tuned(vendor).int64])
def test_where_a_compiler_has_no_int64_none_is_used(vendor: str) -> None:
    assert not {case for case, said in judged()[vendor].items() if "int64" in said["wide"]}


def test_elsewhere_addresses_are_int64() -> None:
    assert "int64" in judged()["cuda"]["mla_decode[bfloat16-decode-latent_576]"]["wide"]
