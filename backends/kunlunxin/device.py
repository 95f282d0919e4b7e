"""Whether torch's CUDA device is a Kunlunxin XPU: torch_xmlir takes an ordinary torch over while that is imported.

What torch.cuda says of the device comes from an imitation of CUDA below it: a name without the vendor's, and the
capability of an NVIDIA GPU. torch.xpu is Intel's, and counts none.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends._probing import Vendor, as_cuda, installed, never_raises, versions

VENDOR = Vendor(
    name="Kunlunxin",
    smi="xpu-smi",
    hides=("CUDA_VISIBLE_DEVICES", "XPU_VISIBLE_DEVICES"),
    torch="install Kunlunxin's xpytorch, with torch_xmlir, for this torch",
)

#: Where a Triton comes from that compiles for it.
TRITON = "install the Triton of Kunlunxin's SDK, 3.2 or newer, in place of the one from PyPI"

#: Distributions whose versions a report should have.
REPORTED = ("torch_xmlir", "kunlun_ops", "xspeedgate_ops", "triton")

#: The switch of the hook that takes torch over.
SWITCH = "DISABLE_XPYTORCH"

#: Nothing public tells one generation from another.
ARCH = "xpu"


def arch() -> str:
    return ARCH


@never_raises(VENDOR.name, lambda: VENDOR.driver_fix)
def probe(torch: Any) -> Device | Unavailable:
    """The XPU, or why there is none."""
    if sys.modules.get("torch_xmlir") is None and installed("torch_xmlir"):
        return _asleep(torch)
    if missing := as_cuda(VENDOR, torch):
        return missing
    return Device(
        type="cuda",
        name=f"Kunlunxin XPU ({torch.cuda.get_device_name(0)})",
        arch=ARCH,
        count=torch.cuda.device_count(),
        versions=versions(*REPORTED, torch=torch.__version__),
    )


def _asleep(torch: Any) -> Unavailable:
    """It is not imported here: that would put its kernels in the place of another device's."""
    what = f"torch_xmlir is installed and has not taken torch {torch.__version__} over"
    if os.environ.get(SWITCH) == "1":
        return Unavailable(f"{what}: {SWITCH}=1", f"unset {SWITCH}")
    fix = "see what its hook printed when Python started, and that torch_xmlir.pth lies beside it; or uninstall it"
    return Unavailable(what, fix, fault=True)
