"""What holds for the backend of every domestic accelerator, on a machine that has none of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import installed

from glm5_hal import explain, formats, use
from glm5_hal.backend import Device, Unavailable, kernels_of
from glm5_hal.backends._triton.tuning import UNTUNED, tuning
from glm5_hal.backends._triton.tuning import _read as read
from glm5_hal.catalogue import Catalogue
from glm5_hal.decision import Rejected
from glm5_hal.ops import specs
from glm5_hal.plugins import PluginRecord, load

#: Name, device type, collectives, status command, a variable that hides devices, and its extension of torch.
VENDORS = {
    "musa": ("musa", "mccl", "mthreads-gmi", "MUSA_VISIBLE_DEVICES", "torch_musa"),
    "hygon": ("cuda", "nccl", "hy-smi", "HIP_VISIBLE_DEVICES", ""),
    "cambricon": ("mlu", "cncl", "cnmon", "MLU_VISIBLE_DEVICES", "torch_mlu"),
    "kunlunxin": ("cuda", "nccl", "xpu-smi", "XPU_VISIBLE_DEVICES", ""),
    "metax": ("cuda", "nccl", "mx-smi", "MACA_VISIBLE_DEVICES", ""),
    "enflame": ("gcu", "eccl", "efsmi", "TOPS_VISIBLE_DEVICES", "torch_gcu"),
}


@pytest.fixture(params=VENDORS)
def vendor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def backend(vendor: str) -> Any:
    return import_module(f"glm5_hal.backends.{vendor}").glm5_backend()


def record(vendor: str) -> PluginRecord:
    return load(PluginRecord(vendor, f"glm5_hal.backends.{vendor}", "glm5-hal", "0", builtin=True), None)


@contextmanager
def here(vendor: str) -> Iterator[Catalogue]:
    with installed(record(vendor)) as catalogue:
        yield catalogue


def test_what_it_is_called_and_how_it_is_reached(vendor: str) -> None:
    device_type, communicator, smi, hides, _ = VENDORS[vendor]
    found = record(vendor)
    assert (found.status, found.reason) == ("ok", "")
    assert (found.device_type, found.communicator, found.smi) == (device_type, communicator, (smi,))
    described = import_module(f"glm5_hal.backends.{vendor}.device").VENDOR
    assert described.smi == smi
    assert hides in described.hides


def test_without_its_software_the_probe_says_what_to_install_and_nothing_is_broken(vendor: str) -> None:
    found = backend(vendor).probe()
    assert isinstance(found, Unavailable)
    assert not found.fault
    assert found.fix.startswith("install ")


@pytest.mark.parametrize("error", ["RuntimeError: driver 42", "OSError: libsdk.so: cannot open"])
def test_a_probe_never_raises(vendor: str, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise (RuntimeError if error.startswith("Runtime") else OSError)(error.partition(": ")[2])

    for asked in ("as_cuda", "extended"):
        monkeypatch.setattr(f"glm5_hal.backends.{vendor}.device.{asked}", fail, raising=False)
    found = backend(vendor).probe()
    assert isinstance(found, Unavailable)
    assert found.fault
    assert error in found.reason
    assert VENDORS[vendor][2] in found.fix
    assert VENDORS[vendor][3] in found.fix


def test_explain_says_what_is_missing(vendor: str) -> None:
    with here(vendor):
        (step,) = explain("rms_norm", device=VENDORS[vendor][0]).resolution.trace
    assert step.candidate == vendor
    assert step.as_dict()["code"] == "UNAVAILABLE"


def test_its_kernels_can_be_listed_without_a_device(vendor: str) -> None:
    found = backend(vendor).kernels()
    plain = {name for name, spec in specs().items() if not spec.composite}
    for provider in ("triton", "torch"):
        assert plain <= {kernel.op for kernel in found if kernel.provider == provider}
    for kernel in found:
        assert kernel.provides <= set(specs()[kernel.op].attributes)


def test_every_native_kernel_has_its_ops_signature(vendor: str) -> None:
    with here(vendor) as catalogue:
        assert catalogue.all_kernels(vendor)


def test_its_cache_formats_are_named_ones(vendor: str) -> None:
    for kind, names in backend(vendor).cache_formats.items():
        assert names
        assert all(formats.FORMATS[name].kind == kind for name in names)
        assert not names[0].startswith("fp8")


@pytest.mark.parametrize("arch", ["", "some_chip"])
def test_no_block_size_is_said_to_be_measured(vendor: str, arch: str) -> None:
    file = import_module(f"glm5_hal.backends.{vendor}").TUNING
    assert tuning(arch, file).source == UNTUNED
    assert not {"blocks", "arch"} & set(read(file))
    assert "float64" not in tuning(arch, file).floats


def test_it_excuses_nothing(vendor: str) -> None:
    text = Path(import_module(f"glm5_hal.backends.{vendor}").__file__ or "").with_name("waivers.toml").read_text()
    assert all(line.startswith("#") for line in text.splitlines() if line)


LIGHT = """
import sys
names = sys.argv[1:]
from importlib import import_module
for name in names:
    import_module(f"glm5_hal.backends.{name}").glm5_backend()
heavy = {"torch", "triton", "flash_mla", "deep_gemm", "torch_musa", "torch_mlu", "torch_gcu"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_them_loads_no_torch_and_no_sdk() -> None:
    command = [sys.executable, "-c", LIGHT, *VENDORS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_probe_leaves_the_process_as_it_was(vendor: str) -> None:
    before, modules = dict(os.environ), set(sys.modules)
    backend(vendor).probe()
    assert dict(os.environ) == before
    new = {name.partition(".")[0] for name in set(sys.modules) - modules}
    assert new <= {"glm5_hal"}


# --- what the guide says of them -------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[2] / "docs/vendors.md"


def test_the_guide_says_how_a_device_is_reached(vendor: str) -> None:
    device_type, communicator, smi, _, _ = VENDORS[vendor]
    hides = import_module(f"glm5_hal.backends.{vendor}.device").VENDOR.hides
    (row,) = (line for line in GUIDE.read_text("utf-8").splitlines() if line.startswith(f"| `{vendor}` |"))
    _, _, device, collectives, variables, command, without, _ = (cell.strip() for cell in row.split("|"))
    assert (device, command) == (f"`{device_type}`", f"`{smi}`")
    assert collectives.partition(" ")[0] == communicator
    assert variables == ", ".join(f"`{name}`" for name in hides)
    limits = read(import_module(f"glm5_hal.backends.{vendor}").TUNING).get("limits", {})
    lacking = ["float64"] * ("floats" in limits) + ["int64"] * (not limits.get("int64", True))
    assert without == (", ".join(lacking) or "-")


def test_the_guide_lists_what_each_library_serves(vendor: str) -> None:
    native: set[tuple[str, str]] = set()
    for library in import_module(f"glm5_hal.backends.{vendor}.libraries").LIBRARIES:
        adapter = import_module(f"glm5_hal.backends.{vendor}.{library.adapter or library.module}")
        native |= {(kernel.provider, kernel.op) for kernel in kernels_of(adapter)}
    (section,) = re.findall(rf"^## [^\n]*\(`{vendor}`\)\n(.*?)(?=^## |\Z)", GUIDE.read_text("utf-8"), re.M | re.S)
    told = set()
    for row in re.findall(r"^\| (`.*)$", section, re.M):
        library, ops, *_ = row.split("|")
        told |= {(library.split("`")[1], op) for op in re.findall(r"`(\w+)`", ops)}
    assert told == native


# --- two vendors' software at once -----------------------------------------------------------------------------------

#: Of each vendor whose device is called cuda: its build of torch.
BUILDS: dict[str, dict[str, Any]] = {
    "hygon": {"version": "2.9.0+das.opt1.dtk2604", "name": "BW200", "cuda": None, "hip": "6.1", "gcn": "gfx936"},
    "metax": {"version": "2.8.0+metax3.5.3.9", "name": "MetaX C500"},
    "cuda": {"version": "2.9.0+cu128", "name": "NVIDIA H100", "cuda": "12.8", "capability": (9, 0)},
}


@pytest.mark.parametrize("owner", BUILDS)
def test_a_device_that_is_called_cuda_has_one_owner_whatever_is_installed_besides(
    build: Any, extension: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: str
) -> None:
    for other in ("torch_xmlir", "torchada", "torch_mlu", "torch_gcu"):
        (tmp_path / f"{other}.py").write_text("raise ImportError('not for this torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    build(**BUILDS[owner])
    found = {name: backend(name).probe() for name in (*VENDORS, "cuda")}
    assert [name for name, answer in found.items() if isinstance(answer, Device)] == [owner]


@pytest.mark.parametrize(("owner", "other"), [("musa", "enflame"), ("enflame", "cambricon"), ("cambricon", "musa")])
def test_a_device_type_of_its_own_has_one_owner_too(
    extension: Any, monkeypatch: pytest.MonkeyPatch, owner: str, other: str
) -> None:
    device_type, *_, module = VENDORS[owner]
    extension(module, device_type, "a device", capability=(5, 0))
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: device_type)
    extension(VENDORS[other][-1], VENDORS[other][0], "another", count=0)
    assert isinstance(backend(owner).probe(), Device)
    found = backend(other).probe()
    assert isinstance(found, Unavailable)
    assert f"one place for an outside device to {device_type!r}" in found.reason


@pytest.mark.parametrize("vendor_", [name for name, facts in VENDORS.items() if facts[-1]])
def test_an_extension_without_a_device_is_broken_and_names_what_may_hide_it(extension: Any, vendor_: str) -> None:
    device_type, _, smi, hides, module = VENDORS[vendor_]
    extension(module, device_type, "none", count=0)
    found = backend(vendor_).probe()
    assert isinstance(found, Unavailable)
    assert found.reason.endswith("finds no device")
    assert smi in found.fix
    assert hides in found.fix
    assert found.fault


#: An architecture of each, as its probe names it.
ARCHS = {
    "ascend": "A3", "musa": "mp_31", "hygon": "gfx938", "cambricon": "mlu590", "kunlunxin": "xpu", "metax": "c500",
    "enflame": "s60",
}  # fmt: skip


@pytest.mark.parametrize("op", specs())
@pytest.mark.parametrize("name", ARCHS)
def test_every_op_is_explained_where_the_device_is_not(name: str, op: str) -> None:
    with installed(record(name)), use(name):
        absent, there = explain(op), explain(op, arch=ARCHS[name])
    (step,) = absent.resolution.trace
    assert isinstance(step.decision, Rejected)
    assert step.decision.code == "UNAVAILABLE"
    assert step.decision.fix
    assert there.ok, str(there)
    for step in there.resolution.trace:
        if isinstance(step.decision, Rejected):
            assert step.decision.code != "CONTRACT", str(there)
            assert step.decision.detail
            assert step.decision.fix
