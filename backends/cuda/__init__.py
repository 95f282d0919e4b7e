"""NVIDIA GPUs: providers ``flash_mla`` and ``deep_gemm`` (other people's kernels, where they are installed), ``gluon``
(ours, for Hopper), ``triton`` (ours, for any chip) and ``torch``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.backends._triton.tunable import tunable
from glm5_hal.hookspecs import hookimpl

#: The versions of Triton whose Gluon is known: it is experimental, and changes from one to the next.
GLUON = ">=3.6,<3.8"

#: Block sizes by architecture; `glm5-hal tune --backend cuda` writes it.
TUNING = Path(__file__).with_name("tuning.toml")


def probe() -> Device | Unavailable:
    from glm5_hal.backends.cuda import device

    return device.probe()


def kernels() -> Sequence[Kernel]:
    import torch

    from glm5_hal.backends import _torch
    from glm5_hal.backends._probing import marked
    from glm5_hal.backends._triton.offered import offered
    from glm5_hal.backends.cuda import device, libraries, products

    if not marked(torch):  # else another vendor's products would be replaced wherever these kernels are only listed
        products.install()
    return (*libraries.adapted(), *_hopper(device.arch()), *offered(device.arch(), TUNING), *_torch.kernels())


def _hopper(arch: str) -> Sequence[Kernel]:
    """None where there is no Triton whose Gluon is known: what another one lacks would show at import."""
    from glm5_hal.backends._triton.tuning import tuning
    from glm5_hal.packages import package_problem

    try:
        version = import_module("triton").__version__
    except (ImportError, AttributeError):  # a folder of that name is a package too, without a version
        return ()
    if package_problem("triton", GLUON, {"triton": version}):
        return ()
    from glm5_hal.backends.cuda import gluon

    tuned = tuning(arch, TUNING)
    return gluon.mla_decode.bound(tuned), gluon.sparse_mla.bound(tuned)


@hookimpl
def glm5_backend() -> Backend:
    return Backend(
        name="cuda",
        device_type="cuda",
        probe=probe,
        kernels=kernels,
        communicator="nccl",
        cache_formats={
            "latent": ("latent_576", "fp8_656", "latent_512_rope_64", "fp8_656_ascend"),
            "index": ("bf16_128", "fp8_132"),
        },
        smi=("nvidia-smi",),
        tuning=tunable(TUNING),
    )
