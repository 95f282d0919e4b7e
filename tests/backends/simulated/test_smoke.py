"""Each vendor's backend on a stand-in of its device, through the suite: evidence "simulated".

A few cases of every op; the whole level is a command: docs/vendor-kit.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from machines import with_stand_ins

from glm5_hal.conformance.cases import cases

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "ci/simulated"

#: Each vendor's type of device, and the product that it is a stand-in of.
VENDORS = {
    "cuda": ("cuda", "NVIDIA H100 80GB HBM3"),
    "ascend": ("npu", "Ascend910B3"),
    "musa": ("musa", "MTT S5000"),
    "hygon": ("cuda", "BW200"),
    "cambricon": ("mlu", "MLU590-M9"),
    "kunlunxin": ("cuda", "Kunlunxin XPU (Kunlun-XPU)"),
    "metax": ("cuda", "MetaX C500"),
    "enflame": ("gcu", "Enflame S60"),
}

#: Cases of each op.
EACH = 2

pytestmark = with_stand_ins


@cache
def chosen() -> tuple[str, ...]:
    """Of every op its relations, the first cases in bfloat16 that the oracle judges, and a tensor of another device."""
    found: dict[str, list[str]] = defaultdict(list)
    for case in cases("smoke"):
        kind = "relation" if case.relation else "bad" if case.bad else case.dtype
        wanted = {"relation": EACH, "bfloat16": EACH, "bad": case.id.endswith("-device]")}.get(kind, 0)
        if len(found[f"{case.op} {kind}"]) < wanted:
            found[f"{case.op} {kind}"].append(case.id)
    return tuple(case for ids in found.values() for case in ids)


def conformance(vendor: str, out: Path, *args: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    plugin = FOLDER / f"{vendor}_simulated.py"
    command = [sys.executable, "-m", "glm5_hal", "conformance", "run", "--plugin", str(plugin), "--in-process", *args]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=600)
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines() if done.returncode < 2 else []
    return done, [json.loads(line) for line in lines]


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_plain_torch_kernels_pass_on_the_vendors_type_of_device(vendor: str, tmp_path: Path) -> None:
    wanted = chosen()
    done, results = conformance(vendor, tmp_path, *(word for case in wanted for word in ("--case", case)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {r["case"]: r["verdict"] for r in results} == dict.fromkeys(wanted, "PASS")
    assert {(r["backend"], r["evidence"], r["device"]) for r in results} == {
        (f"{vendor}-simulated:torch", "simulated", VENDORS[vendor][1])
    }
    # A check that says "n/a" everywhere has shown nothing.
    seen = {check for r in results for check, said in r["checks"].items() if said == "ok"}
    assert {"accuracy", "rerun", "integrity", "workspace", "provenance", "layout", "threads", "graph"} <= seen


def test_a_kernel_that_computes_on_the_host_is_found(tmp_path: Path) -> None:
    """The stand-in is no CPU under another name: the same kernel passes on the CPU."""
    (tmp_path / "hidden.py").write_text(HIDDEN.format(folder=str(ROOT / "ci")))
    command = [sys.executable, "-m", "glm5_hal", "conformance", "run", "--plugin", str(tmp_path / "hidden.py")]
    command += ["--in-process", "--case", "rms_norm[bfloat16-tokens]", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    (result,) = (json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines())
    assert result["code"] in ("provenance", "graph")
    assert "to the host" in result["checks"]["provenance"]
    assert "hidden.py" in result["checks"]["graph"]


def test_a_process_stands_in_for_one_device() -> None:
    done = subprocess.run([sys.executable, "-c", TWO, str(ROOT / "ci")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


TWO = """
import sys
sys.path.append(sys.argv[1])
from glm5_hal import Device, Unavailable
from simulated.identities import IDENTITIES
from simulated.plugin import simulated
for again in range(2):
    assert simulated(IDENTITIES["metax"])().probe().evidence == "simulated"
other = simulated(IDENTITIES["musa"])().probe()
assert isinstance(other, Unavailable)
assert "stands in for MetaX C500" in other.reason
"""

HIDDEN = """
import sys
sys.path.append({folder!r})
from dataclasses import replace
from glm5_hal import hookimpl, kernel
from simulated.identities import IDENTITIES
from simulated.plugin import simulated

@kernel("rms_norm", "torch", provides=("deterministic", "graph_safe"))
def rms_norm(x, weight, *, eps):
    import torch

    there = x.cpu().float()
    y = torch.nn.functional.rms_norm(there, (x.shape[-1],), weight.cpu().float(), eps)
    return y.to(x.dtype).to(x.device)

@hookimpl
def glm5_backend():
    return replace(simulated(IDENTITIES["musa"])(), name="hidden", kernels=lambda: [rms_norm])
"""
