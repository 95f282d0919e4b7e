"""Other people's kernels are offered where they work, and say why where they do not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from toys import installed

from glm5_hal import explain, ops
from glm5_hal.backend import Kernel
from glm5_hal.backends import _torch
from glm5_hal.backends.cuda import libraries
from glm5_hal.ops import specs

from . import standins
from .standins import emulated

#: A call that FlashMLA takes.
WIDTHS = {"dtype": "bfloat16", "H": 64, "W": 576, "X": 576, "kv_lora_rank": 512}


def providers(kernels: Sequence[Kernel]) -> set[str]:
    return {kernel.provider for kernel in kernels}


# --- other people's kernels ------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_left_out() -> None:
    assert libraries.adapted() == []


def test_what_is_installed_comes_before_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.flash_mla(monkeypatch)
    standins.deep_gemm(monkeypatch)
    assert providers(libraries.adapted()) == {"flash_mla", "deep_gemm"}
    with installed(emulated(lambda: [*_torch.kernels(), *libraries.adapted()])):
        found = explain("sparse_mla", **WIDTHS)
        assert found.resolution.chosen is not None
        assert found.resolution.chosen.name == "emulated:flash_mla"
        chosen = explain("sparse_mla", **{**WIDTHS, "H": 8}).resolution.chosen
        assert chosen is not None
        assert chosen.name == "emulated:torch"


def refusal(op: str, **call: Any) -> dict[str, Any]:
    with installed(emulated()):
        (step,) = explain(op, **call).resolution.trace
    return dict(step.as_dict())


def test_a_library_that_is_older_than_its_adapter_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gave an lse of base 2."""
    old = standins.flash_mla(monkeypatch)
    del old.flash_mla_interface.FlashMLASchedMeta
    told = refusal("sparse_mla", **WIDTHS)
    assert told["detail"] == "flash_mla has no flash_mla_interface.FlashMLASchedMeta: it is older than its adapter"
    assert "github.com/deepseek-ai/FlashMLA" in told["fix"]


def test_a_library_that_cannot_be_imported_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "deep_gemm.py").write_text("raise AssertionError('no CUDA_HOME\\nand more')")
    monkeypatch.syspath_prepend(str(tmp_path))
    told = refusal("grouped_gemm", dtype="bfloat16", N=64, K=64)
    assert told["detail"] == "deep_gemm cannot be imported: AssertionError: no CUDA_HOME"
    assert "github.com/deepseek-ai/DeepGEMM" in told["fix"]


def test_every_adapter_claims_what_its_op_knows_and_has_its_ops_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.flash_mla(monkeypatch)
    standins.deep_gemm(monkeypatch)
    with installed(emulated()) as catalogue:
        for kernel in catalogue.all_kernels("emulated"):
            assert kernel.provides <= set(specs()[kernel.op].attributes)


# --- without any of it -----------------------------------------------------------------------------------------------

PLAIN = """
import sys
sys.modules["triton"] = None
import torch, glm5_hal
from glm5_hal import ops
x = torch.ones(2, 8)
ops.rms_norm(x, torch.ones(8), eps=1e-5)
assert ops.rms_norm.choose(x, torch.ones(8), eps=1e-5).name.startswith("cpu:")
"""


def test_the_cpu_needs_neither_triton_nor_a_gpu() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", PLAIN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ops.rms_norm is not None
