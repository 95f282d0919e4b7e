"""The probe takes NVIDIA's GPUs and nobody else's, and says why: seen on a torch whose attributes are made up."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from glm5_hal import context
from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends import cuda
from glm5_hal.backends.cuda import device
from glm5_hal.errors import HalError
from glm5_hal.explanation import explain
from glm5_hal.ops._common import products as shared


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A torch that is another build, on a machine with another device. Not given: an H100 and a build for it."""

    def pretend(
        version: str = "2.9.0+cu128",
        cuda: str | None = "12.8",
        hip: str | None = None,
        name: str = "NVIDIA H100 80GB HBM3",
        capability: tuple[int, int] = (9, 0),
        available: bool = True,
        **more: Any,
    ) -> None:
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=cuda, hip=hip, **more))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda which: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which: capability)

    monkeypatch.setattr(device, "_driver", lambda: "570.86.10")
    return pretend


@pytest.mark.parametrize(
    ("name", "capability", "arch"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), "sm_80"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "sm_89"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "sm_90"),
        ("NVIDIA B200", (10, 0), "sm_100"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "sm_120"),
    ],
)
def test_an_nvidia_gpu(pretend: Any, name: str, capability: tuple[int, int], arch: str) -> None:
    pretend(name=name, capability=capability)
    found = cuda.probe()
    assert isinstance(found, Device)
    assert (found.type, found.name, found.arch, found.count, found.evidence) == ("cuda", name, arch, 2, "hardware")
    assert {"driver": "570.86.10", "cuda": "12.8", "torch": "2.9.0+cu128"}.items() <= found.versions.items()


#: Others that answer True to torch.cuda.is_available(), and most of them a version to torch.version.cuda.
OTHERS: dict[str, dict[str, Any]] = {
    "AMD": {"version": "2.9.0+rocm6.4", "cuda": None, "hip": "6.4.43482", "name": "AMD Instinct MI300X"},
    "Hygon": {"version": "2.9.0+das.opt1.dtk2604", "cuda": None, "hip": "6.1", "name": "BW200"},
    "MetaX": {"version": "2.8.0+metax3.5.3.9", "cuda": "11.6", "name": "MetaX C500"},
    "Iluvatar": {"version": "2.4.1+corex.4.3.0", "cuda": "10.2", "name": "Iluvatar BI-V150"},
    "Moore Threads": {"version": "2.7.1", "cuda": None, "musa": "4.0.0", "name": "MTT S5000"},
}


@pytest.mark.parametrize("vendor", OTHERS)
def test_another_vendors_device_is_that_vendors(pretend: Any, vendor: str) -> None:
    pretend(**OTHERS[vendor])
    found = cuda.probe()
    assert isinstance(found, Unavailable)
    assert f"calls a device of {vendor} cuda" in found.reason
    assert "glm5-hal list" in found.fix
    assert not found.fault


def test_so_is_one_that_takes_a_plain_build_over(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(version="2.5.1+cu118", cuda="11.8", name="NVIDIA A100", capability=(8, 0))
    monkeypatch.setitem(sys.modules, "torch_xmlir", ModuleType("torch_xmlir"))
    found = cuda.probe()
    assert isinstance(found, Unavailable)
    assert "Kunlunxin" in found.reason


@pytest.mark.parametrize("module", ["torch_xmlir", "torch_musa", "torch_mlu", "torch_gcu", "torchada"])
def test_other_vendors_software_that_is_merely_there_changes_nothing(
    pretend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, module: str
) -> None:
    (tmp_path / f"{module}.py").write_text("raise AssertionError('a probe looks, and imports nothing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    pretend()
    assert isinstance(cuda.probe(), Device)


def test_beside_an_extension_of_torch_the_cuda_device_is_still_nvidias(pretend: Any) -> None:
    """torch_musa has set its version; torch.cuda is that of the build."""
    pretend(musa="4.0.0")
    assert isinstance(cuda.probe(), Device)


def test_where_the_extension_stands_in_for_torch_cuda_the_name_tells(pretend: Any) -> None:
    pretend(musa="4.0.0", name="MTT S5000")
    found = cuda.probe()
    assert isinstance(found, Unavailable)
    assert "calls itself 'MTT S5000'" in found.reason


def test_a_device_that_nobody_knows_is_not_taken(pretend: Any) -> None:
    pretend(name="Kunlun-XPU", capability=(8, 0))
    found = cuda.probe()
    assert isinstance(found, Unavailable)
    assert "calls itself 'Kunlun-XPU'" in found.reason


@pytest.mark.parametrize(
    ("machine", "reason", "fix"),
    [
        ({"version": "2.13.0+cpu", "cuda": None}, "torch 2.13.0+cpu is built without CUDA", "install torch for CUDA"),
        ({"available": False}, "torch, built for CUDA 12.8, finds no device", "nvidia-smi"),
        ({"name": "NVIDIA T4", "capability": (7, 5)}, "NVIDIA T4 is sm_75", "from Ampere on"),
    ],
    ids=["a build without CUDA", "no device", "too old"],
)
def test_no_gpu_has_a_reason_and_a_fix(pretend: Any, machine: dict[str, Any], reason: str, fix: str) -> None:
    pretend(**machine)
    found = cuda.probe()
    assert isinstance(found, Unavailable)
    assert found.reason.startswith(reason)
    assert fix in found.fix
    assert not found.fault


def test_what_torch_says_of_a_driver_is_told(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def is_available() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old\nand so on", stacklevel=1)
        return False

    pretend()
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    found = cuda.probe()
    assert isinstance(found, Unavailable)
    assert found.reason.endswith("finds no device: The NVIDIA driver on your system is too old")


@pytest.mark.parametrize("broken", ["is_available", "get_device_name", "get_device_capability", "device_count"])
def test_a_driver_that_raises_is_broken_and_the_probe_does_not(
    pretend: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("CUDA error: unknown error")

    pretend()
    monkeypatch.setattr(torch.cuda, broken, fail)
    found = cuda.probe()
    assert isinstance(found, Unavailable)
    assert "RuntimeError: CUDA error: unknown error" in found.reason
    assert found.fault


def test_a_torch_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise HalError("UNAVAILABLE", "torch cannot be imported", fix="reinstall it")

    monkeypatch.setattr("glm5_hal.autoload.import_torch", fail)
    found = cuda.probe()
    assert found == Unavailable("torch cannot be imported", "reinstall it", fault=True)


def test_the_drivers_version_is_its_own_librarys_or_unknown() -> None:
    assert isinstance(device._driver(), str)


# --- the backend -----------------------------------------------------------------------------------------------------


def test_the_plugin_is_announced_and_in_order() -> None:
    record = context.catalogue().record("cuda")
    assert (record.status, record.reason, record.builtin) == ("ok", "", True)
    assert (record.device_type, record.communicator, record.smi) == ("cuda", "nccl", ("nvidia-smi",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_explain_says_what_is_missing() -> None:
    with context.use("cuda"):
        (step,) = explain("rms_norm", device="cuda").resolution.trace
    told = step.as_dict()
    assert (step.candidate, told["code"]) == ("cuda", "UNAVAILABLE")
    assert told["fix"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_kernels_can_still_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PRODUCTS", {})
    assert {"rms_norm", "sparse_mla"} <= {kernel.op for kernel in cuda.kernels()}


def test_listing_them_leaves_the_products_of_another_vendors_device_alone(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "PRODUCTS", {})
    build("2.8.0+metax3.5.3.9", "MetaX C500", count=0)
    assert cuda.kernels()
    assert shared.PRODUCTS == {}


LIGHT = """
import sys
from glm5_hal.backends.cuda import glm5_backend
glm5_backend()
heavy = {"torch", "triton", "flash_mla", "deep_gemm"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_it_loads_neither_torch_nor_triton() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
