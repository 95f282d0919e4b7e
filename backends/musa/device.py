"""Whether torch_musa has a Moore Threads GPU."""

from __future__ import annotations

from typing import Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends._probing import Vendor, extended, never_raises, none_there, versions

VENDOR = Vendor(
    name="Moore Threads",
    smi="mthreads-gmi",
    hides=("MUSA_VISIBLE_DEVICES", "MTHREADS_VISIBLE_DEVICES"),
    torch="install torch and torch_musa of one release: https://github.com/MooreThreads/torch_musa/releases",
)

#: Where a Triton comes from that compiles for it.
TRITON = "install the Triton of the MUSA SDK, 3.2 or newer, in place of the one from PyPI"

#: Distributions whose versions a report should have.
REPORTED = ("torch_musa", "triton", "mate", "torchada")

#: The architecture whose products take float8_e4m3fn.
FP8 = "mp_31"


def arch() -> str:
    """Of the first GPU; "" without one, where kernels are only listed."""
    import torch

    space = getattr(torch, "musa", None)
    if space is None or not space.is_available():
        return ""
    major, minor = space.get_device_capability(0)
    return f"mp_{major}{minor}"


@never_raises(VENDOR.name, lambda: VENDOR.driver_fix)
def probe(torch: Any) -> Device | Unavailable:
    """The GPU, or why there is none."""
    space = extended(VENDOR, torch, "torch_musa", "musa")
    if isinstance(space, Unavailable):
        return space
    if missing := none_there(VENDOR, space, "torch_musa"):
        return missing
    return Device(
        type="musa",
        name=space.get_device_name(0),
        arch=(found := arch()),
        count=space.device_count(),
        versions=versions(*REPORTED, torch=torch.__version__, musa=getattr(torch.version, "musa", None)),
        features=frozenset({"fp8"} if found == FP8 else ()),
    )
