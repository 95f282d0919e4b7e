"""The probe says which Ascend NPU there is, or what is missing: seen on a torch_npu that is made up."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends import ascend
from glm5_hal.backends.ascend import device

RELEASE = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A torch_npu with a device. Not given: an Atlas A3, with CANN and a driver that say their versions."""
    driver = tmp_path / "version.info"
    driver.write_text("Version=25.3.rc1\nascendhal_version=7.35.23\n")
    monkeypatch.setattr(device, "DRIVER", driver)

    def pretend(
        soc: int = 251,
        name: str = "Ascend910_9382",
        available: bool = True,
        count: int = 16,
        version: str = f"{RELEASE}.0",
        cann: str = "8.5.0",
    ) -> None:
        module = ModuleType("torch_npu")
        module.__spec__ = ModuleSpec("torch_npu", None)
        space = SimpleNamespace(
            is_available=lambda: available, device_count=lambda: count, get_device_name=lambda which: name
        )
        vars(module).update(npu=space, _C=SimpleNamespace(_npu_get_soc_version=lambda: soc))
        monkeypatch.setitem(sys.modules, "torch_npu", module)
        monkeypatch.setattr(torch, "npu", space, raising=False)
        monkeypatch.setattr(torch.version, "cann", cann, raising=False)
        monkeypatch.setattr(device, "version_of", lambda distribution: version)
        monkeypatch.setattr(device, "versions", lambda *names, **known: {"torch_npu": version, **known})
        monkeypatch.setattr(device, "available", lambda: frozenset({"npu_rms_norm"}))

    return pretend


@pytest.mark.parametrize(("soc", "arch"), [(220, "A2"), (225, "A2"), (250, "A3"), (255, "A3"), (260, "Ascend950")])
def test_a_device_is_of_a_generation(pretend: Any, soc: int, arch: str) -> None:
    pretend(soc=soc)
    found = ascend.probe()
    assert isinstance(found, Device)
    assert (found.type, found.name, found.arch, found.count) == ("npu", "Ascend910_9382", arch, 16)
    assert found.evidence == "hardware"
    assert {"cann": "8.5.0", "driver": "25.3.rc1", "torch_npu": f"{RELEASE}.0"}.items() <= found.versions.items()
    assert found.features == {"npu_rms_norm"}
    assert device.arch() == arch


def refusal(**machine: Any) -> Unavailable:
    found = ascend.probe()
    assert isinstance(found, Unavailable)
    return found


def test_no_torch_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    found = refusal()
    assert found.reason == "torch_npu is not installed"
    assert found.fix == f"pip install 'torch_npu=={RELEASE}.*'"
    assert not found.fault


@pytest.mark.parametrize(
    ("machine", "reason", "fix"),
    [
        ({"available": False}, "no NPU is visible", "ASCEND_RT_VISIBLE_DEVICES"),
        ({"count": 0}, "no NPU is visible", "/dev/davinci_manager"),
        ({"version": "2.5.1"}, "torch_npu 2.5.1 is not for torch", f"torch_npu=={RELEASE}.*"),
        ({"soc": 203, "name": "Ascend310P3"}, "Ascend310P3 is an Ascend 310P", "Atlas A2"),
        ({"soc": 999, "name": "Ascend1000"}, "chip number 999", "npu-smi info"),
    ],
    ids=["none available", "none counted", "another torch's", "no bfloat16", "unknown"],
)
def test_no_device_has_a_reason_and_a_fix(pretend: Any, machine: dict[str, Any], reason: str, fix: str) -> None:
    pretend(**machine)
    found = refusal()
    assert reason in found.reason
    assert fix in found.fix


def test_versions_that_nobody_knows_are_left_out(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DRIVER", Path("/nowhere"))
    pretend(cann="not known")
    assert device._cann(torch) == ""
    assert device._driver() == ""
    assert isinstance(ascend.probe(), Device)


def test_anothers_device_in_torchs_one_place(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend()
    monkeypatch.setattr(device, "privateuse1", lambda torch: "musa")
    assert "given torch's one place for an outside device to 'musa'" in refusal().reason


def test_a_driver_that_raises_is_a_fault_and_no_crash(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend()

    def broken() -> bool:
        raise RuntimeError("aclInit failed, error code is 507899")

    monkeypatch.setattr(torch.npu, "is_available", broken)
    found = refusal()
    assert found.fault
    assert "507899" in found.reason


# --- installed, and not to be imported -------------------------------------------------------------------------------

MISSING = "ImportError('libhccl.so: cannot open shared object file: No such file or directory')"


def probed(folder: Path, *, announced: bool = False, **environment: str) -> str:
    """What the probe says in a process that finds what lies in ``folder``; torch loads what is announced."""
    if announced:
        told = folder / "torch_npu-0.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Name: torch_npu\nVersion: {RELEASE}.0\n")
        (told / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    code = "from glm5_hal.backends import ascend; found = ascend.probe(); print(found.reason, '|', found.fix)"
    env = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PATH": "", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


def test_without_cann(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text(f"raise {MISSING}")
    said = probed(tmp_path)
    assert said.startswith("torch_npu is installed, CANN is not: libhccl.so is missing")
    assert "set_env.sh" in said


def test_without_cann_where_torch_loads_it_by_itself(tmp_path: Path) -> None:
    """Then `import torch` fails, for everybody."""
    (tmp_path / "torch_npu.py").write_text(f"raise {MISSING}")
    said = probed(tmp_path, announced=True)
    assert said.startswith("torch loads torch_npu when it is imported, and CANN is not there: libhccl.so is missing")
    assert "set_env.sh" in said
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in said


def test_without_cann_where_torch_was_told_not_to(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text(f"raise {MISSING}")
    said = probed(tmp_path, announced=True, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert said.startswith("torch_npu is installed, CANN is not: libhccl.so is missing")


def test_of_another_torch_it_may_not_even_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text("raise ImportError('undefined symbol: _ZN2at4_ops5emptyE')")
    told = tmp_path / "torch_npu-2.5.1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Name: torch_npu\nVersion: 2.5.1\n")
    assert probed(tmp_path).startswith(f"torch_npu 2.5.1 is not for torch {torch.__version__} | pip install")


def test_what_else_it_raises_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch_npu.py").write_text("raise RuntimeError('half installed')")
    assert probed(tmp_path).startswith("torch_npu cannot be imported: RuntimeError: half installed")
