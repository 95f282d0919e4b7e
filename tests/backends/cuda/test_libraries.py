"""Software that may be there or not is offered where it works, and says why where it does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from toys import checked_here, installed

from glm5_hal import explain, ops
from glm5_hal.backend import Kernel
from glm5_hal.backends import _torch
from glm5_hal.backends.cuda import TUNING, libraries
from glm5_hal.doctor import examine
from glm5_hal.errors import HalError
from glm5_hal.ops import specs
from glm5_hal.plugins import child

from . import standins
from .standins import emulated, put

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


# --- Triton ----------------------------------------------------------------------------------------------------------


def test_triton_is_offered_where_it_is_installed() -> None:
    pytest.importorskip("triton")
    kernels = libraries.triton("sm_90", TUNING)
    assert "triton" in providers(kernels)
    assert not any("Triton" in r.describe() for kernel in kernels for r in kernel.requires)


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(sys.modules, "triton", None)
    missing = "triton>=3.2 is needed and triton is not installed"
    monkeypatch.setattr(libraries, "package_problem", lambda *args: missing)
    monkeypatch.setattr("glm5_hal.capability.package_problem", lambda *args: missing)
    return monkeypatch


def test_without_triton_explain_says_so_and_the_rest_goes_on(without_triton: pytest.MonkeyPatch) -> None:
    with installed(emulated(lambda: [*libraries.triton("sm_90", TUNING), *_torch.kernels()])):
        found = explain("mla_decode")
    first, second = found.resolution.trace[:2]
    assert first.as_dict() == {
        "candidate": "emulated:triton",
        "accepted": False,
        "code": "PACKAGE",
        "detail": "triton>=3.2 is needed and triton is not installed",
        "fix": "pip install 'triton>=3.2'",
    }
    assert (second.candidate, second.as_dict()["accepted"]) == ("emulated:torch", True)


def test_without_triton_the_doctor_says_so(without_triton: pytest.MonkeyPatch) -> None:
    without_triton.setattr(child, "check_up", checked_here)
    with installed(emulated(lambda: [*libraries.triton("sm_90", TUNING), *_torch.kernels()])):
        (found,) = examine().backends
    assert found.state == "ok"
    assert found.kernel.startswith("rms_norm on emulated:torch: right; emulated:triton")
    assert "pip install 'triton>=3.2'" in found.kernel


@pytest.mark.parametrize("version", ["3.1.0", "2.3.1"])
def test_an_old_triton_is_not_used(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    put(monkeypatch, "triton", __version__=version)
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    (kernel, *_) = libraries.triton("sm_90", TUNING)
    assert kernel.requires[0].describe() == "triton>=3.2"
    with installed(emulated(lambda: libraries.triton("sm_90", TUNING))):
        (step,) = explain("rms_norm").resolution.trace
    assert f"{version} is installed" in str(step)


def test_a_triton_that_cannot_be_imported_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "triton", __version__="3.5.0")
    monkeypatch.setattr(libraries, "package_problem", lambda *args: None)

    def fail(tuning: Any) -> Any:
        raise ImportError("libtriton.so: no such file")

    monkeypatch.setattr("glm5_hal.backends._triton.kernels", fail)
    (kernel, *_) = libraries.triton("sm_90", TUNING)
    assert kernel.requires[0].describe() == "Triton's kernels cannot be imported: libtriton.so: no such file"


def test_nobody_calls_what_is_not_there(without_triton: pytest.MonkeyPatch) -> None:
    for kernel in libraries.triton("sm_90", TUNING):
        with pytest.raises(HalError) as problem:
            kernel.fn()
        assert problem.value.code == "UNAVAILABLE"


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
