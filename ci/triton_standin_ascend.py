"""A stand-in for an Ascend NPU's driver, under triton-ascend: kernels are lowered to linalg, and no further.

What makes a binary of linalg is a part of CANN, which no package index has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from triton.backends import backends
from triton.backends.ascend.compiler import _parse_linalg_metadata
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton_outcomes import Resources, outliving


class StandIn(DriverBase):  # type: ignore[misc]
    def __init__(self, target: GPUTarget, device: int) -> None:
        super().__init__()
        self.target, self.device = target, device
        self.utils, self.launcher_cls = self, _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs on a stand-in")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1, "num_aicore": 1, "num_vectorcore": 2}  # of shared memory the compiler says 1

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), object(), 0, 0


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def stand_in(backend: str, arch: int | str, warp_size: int, device: int) -> None:
    """From here on, Triton lowers for this target."""
    driver.set_active(StandIn(GPUTarget(backend, arch, warp_size), device))


def on_compile(found: Callable[[Resources], None]) -> None:
    """Call ``found`` for every kernel that is lowered from here on."""
    backend = backends["ascend"].compiler
    add_stages = getattr(backend.add_stages, "__wrapped__", backend.add_stages)

    @wraps(add_stages)
    def without_binary(self: Any, stages: dict[str, Any], options: Any) -> None:
        add_stages(self, stages, options)
        started = time.monotonic()
        lower, crashed = stages["ttadapter"], 0

        def lowered(ttir: Any, metadata: dict[str, Any]) -> str:
            nonlocal crashed
            linalg, crashed = outliving(lambda: lower(ttir, metadata))
            return str(linalg)

        def read(linalg: str, metadata: dict[str, Any]) -> bytes:
            _parse_linalg_metadata(linalg, metadata)
            found(Resources(metadata["kernel_name"], round(time.monotonic() - started, 3), crashes=crashed))
            return b""

        stages.update(ttadapter=lowered, npubin=read)

    backend.add_stages = without_binary
