"""Whether torch's CUDA device is a Hygon DCU, by a HIP build of torch that is Hygon's."""

from __future__ import annotations

from typing import Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends._probing import Vendor, as_cuda, never_raises, versions

VENDOR = Vendor(
    name="Hygon",
    smi="hy-smi",
    hides=("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    torch="install torch of Hygon's DTK, whose version says das or dtk: https://developer.sourcefind.cn",
)

#: Where a Triton comes from that compiles for it.
TRITON = "install the Triton of Hygon's DTK, 3.2 or newer, in place of the one from PyPI"

#: Distributions whose versions a report should have.
REPORTED = ("triton", "flash_mla", "lightop", "deep_gemm", "aiter")

#: The one architecture whose products take float8, and that e4m3fn.
FP8 = "gfx938"


def arch() -> str:
    """Of the first DCU; "" without one, where kernels are only listed."""
    import torch

    if not torch.cuda.is_available():
        return ""
    name: str = getattr(torch.cuda.get_device_properties(0), "gcnArchName", "")
    return name.split(":")[0]


@never_raises(VENDOR.name, lambda: VENDOR.driver_fix)
def probe(torch: Any) -> Device | Unavailable:
    """The DCU, or why there is none."""
    if missing := as_cuda(VENDOR, torch):
        return missing
    return Device(
        type="cuda",
        name=torch.cuda.get_device_name(0),
        arch=(found := arch()),
        count=torch.cuda.device_count(),
        versions=versions(*REPORTED, torch=torch.__version__, hip=torch.version.hip),
        features=frozenset({"fp8"} if found == FP8 else ()),
    )
