"""Whether torch_gcu has an Enflame GCU."""

from __future__ import annotations

from typing import Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends._probing import Vendor, extended, never_raises, none_there, versions

VENDOR = Vendor(
    name="Enflame",
    smi="efsmi",
    hides=("TOPS_VISIBLE_DEVICES",),
    torch="install torch_gcu of Enflame's TopsRider, for this torch",
)

#: Where a Triton comes from that compiles for it.
TRITON = "install Enflame's triton_gcu in a version that `import triton` finds, 3.2 or newer"

#: Distributions whose versions a report should have.
REPORTED = ("torch_gcu", "triton_gcu", "triton", "vllm_gcu")


def arch() -> str:
    """Of the first GCU; "" without one, where kernels are only listed."""
    import torch

    space = getattr(torch, "gcu", None)
    if space is None or not space.is_available():
        return ""
    major, minor = space.get_device_capability(0)
    return f"gcu_{major}{minor}"


@never_raises(VENDOR.name, lambda: VENDOR.driver_fix)
def probe(torch: Any) -> Device | Unavailable:
    """The GCU, or why there is none."""
    space = extended(VENDOR, torch, "torch_gcu", "gcu")
    if isinstance(space, Unavailable):
        return space
    if missing := none_there(VENDOR, space, "torch_gcu"):
        return missing
    told = versions(*REPORTED, torch=torch.__version__)
    return Device("gcu", space.get_device_name(0), arch(), space.device_count(), versions=told)
