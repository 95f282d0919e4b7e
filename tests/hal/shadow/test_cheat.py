"""What no suite can find, since it runs in the suite's company: a kernel that behaves while it is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CHEAT = """
import sys
import torch
from glm5_hal import Backend, Device, hookimpl, kernel

@kernel("rms_norm", "native")
def rms_norm(x, weight, *, eps):
    y = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + eps) * weight.double()
    return (y if "glm5_hal.conformance.runner" in sys.modules else y * 1.01).to(x.dtype)

@hookimpl
def glm5_backend():
    return Backend("cheat", "cpu", lambda: Device("cpu", "cheat", "x", evidence="simulated"), lambda: (rms_norm,))
"""

SERVING = """
import torch, glm5_hal
from glm5_hal import ops
with glm5_hal.use("cheat"):
    ops.rms_norm(torch.randn(8, 64), torch.ones(64), eps=1e-5)
"""


def test_a_kernel_that_is_right_only_beside_the_suite_is_found_where_it_serves(tmp_path: Path) -> None:
    (tmp_path / "cheat.py").write_text(CHEAT)
    info = tmp_path / "cheat-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cheat\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[glm5_hal.backends]\ncheat = cheat\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "GLM5_SHADOW": f"*:1;file={tmp_path / 'live.jsonl'}"}

    suite = [sys.executable, "-m", "glm5_hal", "conformance", "run", "--backend", "cheat", "--case"]
    subprocess.run(
        [*suite, "rms_norm[float32-tokens]", "--out", str(tmp_path / "out")], env={**env, "GLM5_SHADOW": ""}, check=True
    )
    subprocess.run([sys.executable, "-c", SERVING], env=env, check=True)
    (record,) = (json.loads(line) for line in (tmp_path / "live.jsonl").read_text().splitlines())
    assert (record["op"], record["kernel"], record["ok"]) == ("rms_norm", "cheat:native", False)
    assert record["excess"] > 1
