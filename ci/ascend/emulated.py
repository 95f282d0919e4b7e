"""The Ascend backend's aclnn kernels on a CPU, over an emulator of the vendor's ops: a backend for tests, evidence
"emulated".

    glm5-hal conformance run --plugin ci/ascend/emulated.py --backend ascend-emulated --level smoke

The emulator has the vendor's schemas, computes what its documents say and refuses what they do not allow. It shows that
the adapters mean what the documents mean. What a chip computes it cannot show, nor whether the documents are right.

Weights are plain in the suite's cases, and some kernels take prepared ones only: here they are prepared at the call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.backends import ascend
from glm5_hal.backends.ascend import needs
from glm5_hal.hookspecs import hookimpl

ROOT = Path(__file__).resolve().parents[2]


def probe() -> Device | Unavailable:
    import torch

    _install()
    found = needs.available()
    return Device("cpu", "CANN's ops, as documented", needs.A2, 1, "emulated", {"torch": torch.__version__}, found)


def kernels() -> Sequence[Kernel]:
    _install()
    return [_preparing(kernel) if _takes_prepared(kernel) else kernel for kernel in ascend.aclnn()]


def _install() -> None:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from ci.ascend import emulator

    emulator.install()


def _takes_prepared(kernel: Kernel) -> bool:
    return any(("weight_format", "value") in requirement.reads for requirement in kernel.requires)


def _preparing(kernel: Kernel) -> Kernel:
    """The kernel for plain weights, which are prepared as a loader does it."""

    @wraps(kernel.fn)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        from glm5_hal.ops import specs

        given = specs()[kernel.op].bind(*args, **kwargs)
        made = ascend.prepare(kernel.op, {name: value for name, value in given.items() if name.startswith("w_")})
        assert made is not None, "a requirement lets weights through that cannot be prepared"
        return kernel.fn(**{**given, **made.tensors, "weight_format": made.format})

    others = (r for r in kernel.requires if ("weight_format", "value") not in r.reads)
    return replace(kernel, fn=prepared, requires=tuple(others))


@hookimpl
def glm5_backend() -> Backend:
    return Backend(
        name="ascend-emulated",
        device_type="cpu",
        probe=probe,
        kernels=kernels,
        cache_formats={"latent": ("latent_512_rope_64", "latent_576"), "index": ("bf16_128",)},
        prepare=ascend.prepare,
    )
