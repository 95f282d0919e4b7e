"""Kunlunxin XPUs, whose torch calls them cuda: providers ``kunlun_ops`` (where it is installed), ``triton`` (ours) and
``torch``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.backends._triton.tunable import tunable
from glm5_hal.hookspecs import hookimpl

#: What its Triton compiler lacks, and block sizes by architecture; `glm5-hal tune --backend kunlunxin` writes those.
TUNING = Path(__file__).with_name("tuning.toml")


def probe() -> Device | Unavailable:
    from glm5_hal.backends.kunlunxin import device

    return device.probe()


def kernels() -> Sequence[Kernel]:
    from glm5_hal.backends import _torch
    from glm5_hal.backends._triton.offered import offered
    from glm5_hal.backends.kunlunxin import device, libraries

    return (*libraries.adapted(), *offered(device.arch(), TUNING, device.TRITON), *_torch.kernels())


@hookimpl
def glm5_backend() -> Backend:
    return Backend(
        name="kunlunxin",
        device_type="cuda",
        probe=probe,
        kernels=kernels,
        communicator="nccl",
        cache_formats={
            "latent": ("latent_576", "latent_512_rope_64", "fp8_656", "fp8_656_ascend"),
            "index": ("bf16_128", "fp8_132"),
        },
        smi=("xpu-smi",),
        tuning=tunable(TUNING),
    )
