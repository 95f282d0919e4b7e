"""Whether torch_mlu has a Cambricon MLU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends._probing import Vendor, extended, never_raises, none_there, versions

VENDOR = Vendor(
    name="Cambricon",
    smi="cnmon",
    hides=("MLU_VISIBLE_DEVICES",),
    torch="install torch_mlu of Cambricon's SDK, for this torch: https://developer.cambricon.com",
)

#: Where a Triton comes from that compiles for it.
TRITON = "install the Triton of Cambricon's SDK, 3.2 or newer, in place of the one from PyPI"

#: Distributions whose versions a report should have.
REPORTED = ("torch_mlu", "torch_mlu_ops", "triton")

#: The first generation with bfloat16, which GLM-5 is computed in.
OLDEST = 5

#: With it, torch_mlu counts devices by the management library, and does not start the driver.
CHECK = "PYTORCH_CNDEV_BASED_MLU_CHECK"


def arch() -> str:
    """Of the first MLU; "" without one, where kernels are only listed."""
    import torch

    space = getattr(torch, "mlu", None)
    if space is None or not space.is_available():
        return ""
    major, minor = space.get_device_capability(0)
    return f"mlu_{major}{minor}"


@never_raises(VENDOR.name, lambda: VENDOR.driver_fix)
def probe(torch: Any) -> Device | Unavailable:
    """The MLU, or why there is none."""
    space = extended(VENDOR, torch, "torch_mlu", "mlu")
    if isinstance(space, Unavailable):
        return space
    with _driver_asleep():
        if missing := none_there(VENDOR, space, "torch_mlu"):
            return missing
    name, (major, _) = space.get_device_name(0), space.get_device_capability(0)
    if major < OLDEST:
        what = f"{name} is of generation {major}, and bfloat16 begins with {OLDEST}"
        return Unavailable(what, "use a newer MLU, or GLM5_BACKEND=cpu")
    known = {"torch": torch.__version__, "neuware": getattr(torch.version, "mlu", None)}
    return Device("mlu", name, arch(), space.device_count(), versions=versions(*REPORTED, **known))


@contextmanager
def _driver_asleep() -> Iterator[None]:
    before = os.environ.get(CHECK)
    os.environ[CHECK] = "1"
    try:
        yield
    finally:
        os.environ.pop(CHECK, None)
        if before is not None:
            os.environ[CHECK] = before
