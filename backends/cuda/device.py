"""Whether torch's CUDA device is an NVIDIA GPU. Others answer to ``torch.cuda`` too: each is ruled out by a mark of its
own, and what is left must say NVIDIA."""

from __future__ import annotations

import ctypes
import warnings
from typing import Any

from glm5_hal.backend import Device, Unavailable
from glm5_hal.backends._probing import marked, never_raises, versions

#: The first architecture with bfloat16, which GLM-5 is computed in.
OLDEST = (8, 0)

#: Distributions whose versions a report should have.
REPORTED = ("triton", "flash_mla", "deep_gemm")

DRIVER_FIX = "see whether `nvidia-smi` answers, and whether CUDA_VISIBLE_DEVICES hides the device"
OTHERS_FIX = "name that vendor's backend (`glm5-hal list` shows which are here), or GLM5_BACKEND=cpu"


def arch() -> str:
    """Of the first GPU, as ``arch(...)`` requirements have it; "" without one, where kernels are only listed."""
    import torch

    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(0)
    return f"sm_{major}{minor}"


@never_raises("CUDA", lambda: DRIVER_FIX)
def probe(torch: Any) -> Device | Unavailable:
    """The GPU, or why there is none."""
    if others := marked(torch):
        return Unavailable(f"torch {torch.__version__} calls a device of {' and '.join(others)} cuda", OTHERS_FIX)
    if torch.version.cuda is None:
        fix = "install torch for CUDA: https://pytorch.org/get-started/locally"
        return Unavailable(f"torch {torch.__version__} is built without CUDA", fix)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        why = f": {str(said[0].message).splitlines()[0]}" if said else ""
        return Unavailable(f"torch, built for CUDA {torch.version.cuda}, finds no device{why}", DRIVER_FIX)
    name = torch.cuda.get_device_name(0)
    if "NVIDIA" not in name:
        return Unavailable(f"the CUDA device calls itself {name!r}: it is not known for NVIDIA's", OTHERS_FIX)
    if torch.cuda.get_device_capability(0) < OLDEST:
        what = f"{name} is {arch()}, and bfloat16 begins with sm_{OLDEST[0]}{OLDEST[1]}"
        return Unavailable(what, "use a GPU from Ampere on, or GLM5_BACKEND=cpu")
    return Device(
        type="cuda",
        name=name,
        arch=arch(),
        count=torch.cuda.device_count(),
        versions=versions(*REPORTED, driver=_driver(), cuda=torch.version.cuda, torch=torch.__version__),
    )


def _driver() -> str:
    """The driver's version, of its own library: starting nvidia-smi takes a second."""
    try:
        nvml, text = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(80)
        if nvml.nvmlInit_v2():
            return ""
        failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # not Linux, or not there
        return ""
    return "" if failed else text.value.decode(errors="replace")
