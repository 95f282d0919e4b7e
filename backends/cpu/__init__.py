"""The CPU: providers ``sdpa`` (torch's fused attention), ``torch`` (tiled plain torch) and ``reference`` (executable
semantics, only when named)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.hookspecs import hookimpl


def probe() -> Device | Unavailable:
    from glm5_hal.autoload import import_torch

    import_torch()
    import torch

    return Device(
        type="cpu",
        name=_model() or platform.processor() or "unknown CPU",
        arch=platform.machine(),
        count=1,
        versions={"torch": torch.__version__, "threads": str(torch.get_num_threads())},
        features=frozenset({torch.backends.cpu.get_cpu_capability().lower()}),
    )


def _model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:  # not Linux
        return ""


def kernels() -> Sequence[Kernel]:
    from glm5_hal.backends import _torch
    from glm5_hal.backends.cpu import reference, sdpa

    return (*sdpa.kernels(), *_torch.kernels(), *reference.kernels())


def prepare(op: str, weights: Mapping[str, Any]) -> Any:
    from glm5_hal.backends.cpu.weights import prepare as prepared

    return prepared(op, weights)


@hookimpl
def glm5_backend() -> Backend:
    return Backend(
        name="cpu",
        device_type="cpu",
        probe=probe,
        kernels=kernels,
        prepare=prepare,
        communicator="gloo",
        cache_formats={
            "latent": ("latent_576", "latent_512_rope_64", "fp8_656", "fp8_656_ascend"),
            "index": ("bf16_128", "fp8_132"),
        },
    )
