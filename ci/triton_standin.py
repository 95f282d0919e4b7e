"""A stand-in for a GPU's driver: kernels are specialised and compiled as for the real one, and never run.

Compiling a kernel's source alone would not do. Whether a pointer or a stride is divisible by 16 is seen in a call's
arguments only, and without it there is no asynchronous copy, no pipelining and no true count of registers.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton_outcomes import Resources

#: More than any kernel asks for: what is too much is for the budgets to say.
PLENTY = 1 << 30

#: Of matrices, the best of each chip first.
MATRIX = ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma")


class StandIn(DriverBase):  # type: ignore[misc]
    """``device`` tells targets apart: Triton keeps what it compiled by the number of the device."""

    def __init__(self, target: GPUTarget, device: int) -> None:
        super().__init__()
        self.target, self.device = target, device
        self.utils, self.launcher_cls = self, _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs on a stand-in")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": PLENTY, "multiprocessor_count": 1, "warpSize": self.target.warp_size}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), object(), 0, 0, PLENTY


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def stand_in(backend: str, arch: int | str, warp_size: int, device: int) -> None:
    """From here on, Triton compiles for this target."""
    driver.set_active(StandIn(GPUTarget(backend, arch, warp_size), device))


def on_compile(found: Callable[[Resources], None]) -> None:
    """Call ``found`` for every kernel that is compiled from here on."""

    def listener(*, src: Any, metadata: Any, metadata_group: dict[str, str], times: Any, cache_hit: bool) -> None:
        files = {Path(name).suffix[1:]: Path(path) for name, path in metadata_group.items()}
        assembly = files["ptx" if "ptx" in files else "amdgcn"].read_text()
        seconds = round(times.total / 1e6, 3)
        registers, spilled, scalars = _cuda(files["cubin"]) if "cubin" in files else _amd(assembly)
        matrix = next((name for name in MATRIX if name in assembly), "")
        shared, warps, stages = (metadata[name] for name in ("shared", "num_warps", "num_stages"))
        found(Resources(src.fn.__name__, seconds, registers, spilled, scalars, shared, matrix, warps, stages))

    knobs.compilation.listener = listener


def _cuda(cubin: Path) -> tuple[int, int, int]:
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stack = _number(r"STACK:(\d+)", shown) + _number(r"LOCAL:(\d+)", shown)
    return _number(r"REG:(\d+)", shown), -(-stack // 4), 0


def _amd(assembly: str) -> tuple[int, int, int]:
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")  # the first counts accumulation registers too
    registers, spilled, scalars = (_number(rf"\.{name}:\s*(\d+)", assembly) for name in names)
    return registers, spilled, scalars


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in a compiled kernel's report:\n{text[-2000:]}")
    return int(found[1])
