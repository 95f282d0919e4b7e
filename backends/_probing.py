"""How probes tell whose device it is, by cheap evidence: no driver is started to find out.

Several vendors' torch calls their device "cuda". Each is told by a mark of its own, so the order of questions does not
matter, and where two marks are found the device is nobody's. Others extend an ordinary torch by a device type of their
own; torch has one place for such a type, so of several extensions one can be loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib import import_module, metadata
from importlib.util import find_spec
from shutil import which
from typing import Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.errors import HalError


@dataclass(frozen=True)
class Vendor:
    """What a customer must be told to find a device again.

    Attributes:
        name: as people know it.
        smi: its status command.
        hides: variables that hide devices.
        torch: what its torch is and where it comes from.
    """

    name: str
    smi: str
    hides: tuple[str, ...]
    torch: str

    @property
    def driver_fix(self) -> str:
        set_here = [f"{name}={os.environ[name]!r}" for name in self.hides if name in os.environ]
        here = f" ({', '.join(set_here)} is set)" if set_here else ""
        return f"see whether `{self.smi}` answers, and whether {' or '.join(self.hides)} hides the device{here}"


# --- whose torch calls its device cuda -------------------------------------------------------------------------------


def _version(torch: Any) -> str:
    return str(torch.__version__).lower()


def _hygon(torch: Any) -> bool:
    """Its builds of torch say das or dtk, and AMD's say rocm. What was built from source says nothing: then its tools
    are there."""
    if not torch.version.hip:
        return False
    said = any(mark in _version(torch) for mark in ("das", "dtk"))
    return said or ("rocm" not in _version(torch) and which("hy-smi") is not None)


#: Marks of torch as it runs, by vendor. What is merely installed, or lies on the disk, is no mark.
MARKS: Mapping[str, Callable[[Any], bool]] = {
    "AMD": lambda torch: bool(torch.version.hip) and not _hygon(torch),
    "Hygon": _hygon,
    "Iluvatar": lambda torch: "corex" in _version(torch),
    # Its hook takes an ordinary build of torch over, while that is imported, by putting its own kernels in.
    "Kunlunxin": lambda torch: sys.modules.get("torch_xmlir") is not None,
    "MetaX": lambda torch: "metax" in _version(torch),
    # torchada lets torch.cuda be torch.musa; an NVIDIA build beside the extension has a torch.cuda of its own.
    "Moore Threads": lambda torch: bool(getattr(torch.version, "musa", None)) and torch.version.cuda is None,
}


def marked(torch: Any) -> tuple[str, ...]:
    """The vendors whose mark this torch has; none where it is NVIDIA's, without CUDA, or unknown."""
    return tuple(name for name, mark in MARKS.items() if mark(torch))


def as_cuda(vendor: Vendor, torch: Any, suspected: bool = False) -> Unavailable | None:
    """Why torch's CUDA device is not this vendor's; None where it is, and is there.

    ``suspected``: the machine has its driver. Then a device of an unmarked build may tell by its name.
    """
    owners = marked(torch)
    if not owners and suspected and torch.cuda.is_available() and vendor.name in torch.cuda.get_device_name(0):
        return None
    if vendor.name not in owners:
        others = f": it calls a device of {' and '.join(owners)} cuda" if owners else ""
        return Unavailable(f"torch {torch.__version__} is no build of {vendor.name}{others}", vendor.torch)
    if len(owners) > 1:
        what = f"torch {torch.__version__} has the marks of {' and '.join(owners)}: whose its device is, is not known"
        return Unavailable(what, "install the software of one vendor only", fault=True)
    if not torch.cuda.is_available() or torch.cuda.device_count() < 1:
        return Unavailable(f"{vendor.name}'s torch {torch.__version__} finds no device", vendor.driver_fix, fault=True)
    return None


# --- extensions with a device type of their own ----------------------------------------------------------------------


def extended(vendor: Vendor, torch: Any, module: str, device_type: str) -> Any | Unavailable:
    """The namespace that the extension ``module`` gives torch for its device type, or why there is none."""
    if not installed(module):
        return Unavailable(f"{module} is not installed", vendor.torch)
    held = privateuse1(torch)
    if held not in ("privateuseone", device_type):
        what = (
            f"this process has given torch's one place for an outside device to {held!r}, so there is no {device_type}"
        )
        return Unavailable(what, f"start a process that loads {module} only; uninstall the other, or name its backend")
    try:
        import_module(module)
    except Exception as problem:  # noqa: BLE001 - compiled for another torch or SDK, it may raise anything
        said = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        what = f"{module} {version_of(module)}, beside torch {torch.__version__}, cannot be imported: {said}"
        fix = f"see that it was built for this torch and that LD_LIBRARY_PATH leads to its SDK; {vendor.torch}"
        return Unavailable(what, fix, fault=True)
    space = getattr(torch, device_type, None)
    lacking = [name for name in ("is_available", "device_count", "get_device_name") if not hasattr(space, name)]
    if lacking:
        what = f"{module} gives torch no {device_type}.{lacking[0]}: it is half installed, or of another generation"
        return Unavailable(what, vendor.torch, fault=True)
    return space


def installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a package whose __init__ is gone; a stand-in without a spec
        return False


def privateuse1(torch: Any) -> str:
    """What torch's place for an outside device is called: "privateuseone" while nobody has it."""
    name: str = torch._C._get_privateuse1_backend_name()
    return name


def none_there(vendor: Vendor, space: Any, module: str) -> Unavailable | None:
    """What to say where the extension finds no device; None where it does."""
    if space.is_available() and space.device_count() > 0:
        return None
    return Unavailable(f"{module} {version_of(module)} finds no device", vendor.driver_fix, fault=True)


# --- for all of them -------------------------------------------------------------------------------------------------


def never_raises(
    name: str, fix: Callable[[], str]
) -> Callable[[Callable[..., Any]], Callable[[], Device | Unavailable]]:
    """For a probe that is given torch: what it raises is an answer, too. ``name`` is the device's, in sentences."""

    def wrap(probe: Callable[[Any], Device | Unavailable]) -> Callable[[], Device | Unavailable]:
        @wraps(probe)
        def answered() -> Device | Unavailable:
            from glm5_hal.autoload import import_torch

            try:
                import_torch()
                import torch

                return probe(torch)
            except HalError as problem:
                return Unavailable(problem.what, problem.fix, fault=True)
            except Exception as problem:  # noqa: BLE001 - a broken driver raises what it likes
                what = f"torch cannot use its {name} device: {type(problem).__name__}: {problem}"
                return Unavailable(what, fix(), fault=True)

        return answered

    return wrap


def version_of(distribution: str) -> str:
    """Of an installed distribution; "" where nobody says."""
    try:
        return metadata.version(distribution) or ""
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return ""


def versions(*distributions: str, **known: str | None) -> dict[str, str]:
    """Those that there are: of distributions by name, and others as given."""
    found = {**known, **{name: version_of(name) for name in distributions}}
    return {name: version for name, version in found.items() if version}
