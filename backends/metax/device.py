"""Whether torch's CUDA device is a MetaX GPU: by torch's build, or by its name where the machine has the driver."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends._probing import Vendor, as_cuda, never_raises, versions

VENDOR = Vendor(
    name="MetaX",
    smi="mx-smi",
    hides=("CUDA_VISIBLE_DEVICES", "MACA_VISIBLE_DEVICES"),
    torch="install MetaX's torch, whose version says metax: https://developer.metax-tech.com",
)

#: Where a Triton comes from that compiles for it.
TRITON = "install the Triton of MetaX's SDK, 3.2 or newer, in place of the one from PyPI"

#: Distributions whose versions a report should have.
REPORTED = ("triton", "flash_mla", "mcoplib", "deep_gemm")

#: What a machine with its driver has.
DRIVER = Path("/dev/mxcd")


def arch() -> str:
    """The first GPU's product ("c500"), for torch does not tell the core; "" without one."""
    import torch

    if not torch.cuda.is_available():
        return ""
    name: str = torch.cuda.get_device_name(0)
    return name.lower().removeprefix("metax").strip().replace(" ", "_")


@never_raises(VENDOR.name, lambda: VENDOR.driver_fix)
def probe(torch: Any) -> Device | Unavailable:
    """The GPU, or why there is none."""
    if missing := as_cuda(VENDOR, torch, suspected=DRIVER.exists() or "MACA_PATH" in os.environ):
        return missing
    _, _, maca = str(torch.__version__).partition("metax")
    return Device(
        type="cuda",
        name=torch.cuda.get_device_name(0),
        arch=arch(),
        count=torch.cuda.device_count(),
        versions=versions(*REPORTED, torch=torch.__version__, maca=maca),
    )
