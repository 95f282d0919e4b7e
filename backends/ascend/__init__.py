"""Huawei Ascend NPUs through torch_npu: providers ``aclnn`` (the vendor's fused ops), ``triton`` (ours, where
triton-ascend is installed) and ``torch``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm5_hal.backend import Backend, Device, Kernel, Unavailable, kernels_of
from glm5_hal.backends._triton.tunable import tunable
from glm5_hal.hookspecs import hookimpl

#: Block sizes by generation; `glm5-hal tune --backend ascend` writes it.
TUNING = Path(__file__).with_name("tuning.toml")


def probe() -> Device | Unavailable:
    from glm5_hal.backends.ascend import device

    return device.probe()


def kernels() -> Sequence[Kernel]:
    from glm5_hal.backends import _torch
    from glm5_hal.backends._triton.offered import offered
    from glm5_hal.backends.ascend import device

    return (*aclnn(), *offered(device.arch(), TUNING, "pip install triton-ascend"), *_torch.kernels())


def aclnn() -> Sequence[Kernel]:
    """Kernels that call the vendor's ops. They can be listed anywhere: torch_npu is needed when one is called."""
    from glm5_hal.backends.ascend import caches, dense, elementwise, indexer, moe, norms, prolog, sparse

    return kernels_of(norms, elementwise, caches, indexer, sparse, dense, prolog, moe)


def prepare(op: str, weights: Mapping[str, Any]) -> Any:
    from glm5_hal.backends.ascend.weights import prepare as prepared

    return prepared(op, weights)


@hookimpl
def glm5_backend() -> Backend:
    return Backend(
        name="ascend",
        device_type="npu",
        probe=probe,
        kernels=kernels,
        communicator="hccl",
        cache_formats={
            "latent": ("latent_512_rope_64", "latent_576", "fp8_656_ascend", "fp8_656"),
            "index": ("bf16_128", "fp8_132"),
        },
        prepare=prepare,
        smi=("npu-smi", "info"),
        tuning=tunable(TUNING),
    )
