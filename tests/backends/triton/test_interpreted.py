"""Every Triton kernel through the suite, in Triton's interpreter: evidence "interpreted"."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from glm5_hal.ops import specs

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = ROOT / "ci/triton_interpreter.py"

#: Ops that their parts serve, and ops whose batch decides how keys are split, unless another provider is asked for.
COMPOSED = ("indexer_prolog", "mla_prolog")
SPLIT = ("mla_decode", "sparse_mla")
KERNELS = [*((op, "triton") for op in specs() if op not in COMPOSED), *((op, "triton-invariant") for op in SPLIT)]


def conformance(*args: str) -> subprocess.CompletedProcess[str]:
    how = ("--plugin", str(PLUGIN), "--workers", "2", "--timeout", "600")  # interpreted, a long row takes minutes
    command = [sys.executable, "-m", "glm5_hal", "conformance", "run", *how, "--json", *args]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "provider"), KERNELS)
def test_it_passes_the_smoke_level(op: str, provider: str, tmp_path: Path) -> None:
    policy = f"triton-interpreter:{provider}"
    done = conformance("--backend", policy, "--level", "smoke", "--op", op, "--out", str(tmp_path))
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    failed = [f"{r['case']}: {r['detail']}" for r in results if r["verdict"] not in ("PASS", "UNSUPPORTED")]
    assert not failed, done.stderr
    assert done.returncode == 0, done.stderr
    assert {r["evidence"] for r in results} == {"interpreted"}
    refused = [r["case"] for r in results if r["verdict"] == "UNSUPPORTED" and " is float64" not in r["detail"]]
    assert not refused
