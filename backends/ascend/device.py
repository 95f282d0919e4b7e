"""Whether torch_npu has an Ascend NPU, of which generation, and what is missing where it has none."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from glm5_hal.autoload import SWITCH
from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends._probing import installed, never_raises, privateuse1, version_of, versions
from glm5_hal.backends.ascend.needs import A2, A3, A5, available

#: Generations by the driver's number for the chip, both ends included.
GENERATIONS = ((220, 225, A2), (250, 255, A3), (260, 260, A5))

#: The Ascend 310P: no bfloat16, and hardly one of the fused ops.
INFERENCE = range(200, 206)

#: Where the driver's package says its version.
DRIVER = Path("/usr/local/Ascend/driver/version.info")

#: What the linker names that does not find CANN.
LIBRARY = re.compile(r"lib\w+\.so")

CANN_FIX = "install CANN, then `source /usr/local/Ascend/ascend-toolkit/set_env.sh` in the shell that starts Python"
DEVICE_FIX = (
    "see whether `npu-smi info` lists a device, whether ASCEND_RT_VISIBLE_DEVICES hides it, and whether a container "
    "was given /dev/davinci0, /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc"
)


def arch() -> str:
    """The generation, as ``arch(...)`` requirements have it; "" without a device, where kernels are only listed."""
    npu = getattr(sys.modules.get("torch"), "npu", None)
    return _generation() if npu is not None and npu.is_available() else ""


def probe() -> Device | Unavailable:
    """The NPU, or why there is none. Where torch itself fails, since it loads torch_npu, that is told as what it is."""
    found = _probe()
    if isinstance(found, Unavailable) and SWITCH in found.fix and (library := LIBRARY.search(found.reason)):
        what = f"torch loads torch_npu when it is imported, and CANN is not there: {library[0]} is missing"
        return Unavailable(what, f"{CANN_FIX}; or set {SWITCH}=0, to use torch without the NPU")
    return found


@never_raises("Ascend", lambda: DEVICE_FIX)
def _probe(torch: Any) -> Device | Unavailable:
    if not installed("torch_npu"):
        return Unavailable("torch_npu is not installed", f"pip install 'torch_npu=={_release(torch.__version__)}.*'")
    if (held := privateuse1(torch)) not in ("privateuseone", "npu"):
        what = f"this process has given torch's one place for an outside device to {held!r}, so there is no npu"
        return Unavailable(what, "start a process that loads torch_npu only; uninstall the other, or name its backend")
    mismatch = _mismatch(torch.__version__)
    try:
        npu = import_module("torch_npu").npu
    except Exception as problem:  # noqa: BLE001 - what it raises depends on what it misses
        return mismatch or _unloadable(problem)
    if mismatch is not None:
        return mismatch
    if not npu.is_available() or npu.device_count() < 1:
        return Unavailable("torch_npu is there and CANN loads, but no NPU is visible", DEVICE_FIX)
    generation, name = _generation(), npu.get_device_name(0)
    if not generation:
        return _other_chip(_soc(), name)
    found = versions("torch_npu", torch=torch.__version__, cann=_cann(torch), driver=_driver())
    return Device("npu", name, generation, npu.device_count(), versions=found, features=available())


def _unloadable(problem: Exception) -> Unavailable:
    said = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
    if (library := LIBRARY.search(str(problem))) and isinstance(problem, ImportError | OSError):
        return Unavailable(f"torch_npu is installed, CANN is not: {library[0]} is missing", CANN_FIX)
    return Unavailable(f"torch_npu cannot be imported: {said}", CANN_FIX, fault=True)


def _mismatch(torch_version: str) -> Unavailable | None:
    """torch_npu X.Y is for torch X.Y alone: it uses symbols that have no stable interface."""
    own, wanted = version_of("torch_npu"), _release(torch_version)
    if not own or _release(own) == wanted:
        return None
    return Unavailable(f"torch_npu {own} is not for torch {torch_version}", f"pip install 'torch_npu=={wanted}.*'")


def _release(version: str) -> str:
    return ".".join(version.partition("+")[0].split(".")[:2])


def _soc() -> int:
    return int(import_module("torch_npu")._C._npu_get_soc_version())


def _generation() -> str:
    soc = _soc()
    return next((name for first, last, name in GENERATIONS if first <= soc <= last), "")


def _other_chip(soc: int, name: str) -> Unavailable:
    if soc in INFERENCE:
        return Unavailable(f"{name} is an Ascend 310P, which has no bfloat16", "use an Atlas A2, A3 or 950")
    known = ", ".join(f"{first} to {last}: {what}" for first, last, what in GENERATIONS)
    return Unavailable(
        f"{name} has the chip number {soc}, which is none that is known ({known})",
        "update glm5-hal, or report the number with the output of `npu-smi info`",
    )


def _cann(torch: Any) -> str:
    cann = getattr(torch.version, "cann", None)
    return "" if cann in (None, "not known") else str(cann)


def _driver() -> str:
    try:
        text = DRIVER.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return ""
    found = re.search(r"^Version=(\S+)", text, re.MULTILINE)
    return found[1] if found else ""
