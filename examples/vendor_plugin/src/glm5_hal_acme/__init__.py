"""The acme backend of glm5-hal; its entry point is in pyproject.toml."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from glm5_hal import Backend, Device, Kernel, Unavailable, hookimpl, kernels_of


def probe() -> Device | Unavailable:
    """Say which device is here, or why there is none and what to do about it. Never raises."""
    # REPLACE THIS BODY. It answers for the CPU in your device's place, and says so: evidence="simulated". Yours asks
    # your SDK, which is imported here and nowhere above, and says yes on positive evidence of your own hardware only
    # (torch.cuda.is_available() is none: several vendors answer to it):
    #
    #     try:
    #         import your_sdk
    #     except ImportError:
    #         return Unavailable("your_sdk is not installed", "pip install your-sdk")
    #     if your_sdk.device_count() == 0:
    #         return Unavailable("your_sdk sees no device", "run your-smi, and check the driver")
    #     return Device(
    #         type="cuda",  # torch's device type of the tensors that you take
    #         name=your_sdk.device_name(0),
    #         arch=your_sdk.arch(0),
    #         count=your_sdk.device_count(),
    #         versions={"driver": your_sdk.driver_version()},
    #     )
    import torch

    return Device(
        type="cpu",
        name="the host's CPU, standing in",
        arch=platform.machine(),
        evidence="simulated",
        versions={"torch": torch.__version__},
    )


def load_kernels() -> Sequence[Kernel]:
    """Your own kernels, and glm5-hal's plain-torch ones for every op that you have not written yet."""
    from glm5_hal.backends import _torch

    from glm5_hal_acme import kernels

    return (*kernels_of(kernels), *_torch.kernels())


@hookimpl
def glm5_backend() -> Backend:
    return Backend(
        name="acme",
        device_type="cpu",  # REPLACE THIS: the same as in probe()
        probe=probe,
        kernels=load_kernels,
    )
