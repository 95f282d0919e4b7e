"""A vendor's plugin as a single file, some of whose kernels harm their process. It is given to `--plugin`."""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from glm5_hal import Backend, Device, Kernel, hookimpl, kernel
from glm5_hal.backends import _torch


def segfault(**args: Any) -> None:
    sys.stdout.write("reading address 0\n")
    ctypes.string_at(0)


def hang(**args: Any) -> None:
    """In C, with the GIL held and every signal blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).pause()


def exhaust(**args: Any) -> None:
    kept = []
    while True:
        kept.append(torch.empty(1 << 30, dtype=torch.uint8))


def overrun(*, x: torch.Tensor, **args: Any) -> None:
    """Writes into the buffer that lies behind its input."""
    torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())[-100:] = 7  # type: ignore[call-overload]


def close_stdout(**args: Any) -> None:
    os.close(1)


def print_garbage(**args: Any) -> None:
    os.write(1, bytes(range(256)) * 100)
    sys.stderr.write("{}\n")


def interrupt(**args: Any) -> None:
    raise KeyboardInterrupt


def lose_device(**args: Any) -> None:
    raise getattr(torch, "AcceleratorError", RuntimeError)("AcceleratorError: illegal address")


def nap(**args: Any) -> None:
    time.sleep(0.005)


DEEDS: dict[str, Callable[..., None]] = {
    "rms_norm": segfault,
    "rope": hang,
    "hadamard": exhaust,
    "silu_and_mul": overrun,
    "moe_combine": close_stdout,
    "moe_permute": print_garbage,
    "add_rms_norm": interrupt,
    "moe_route": lose_device,
    "topk_indices": nap,
}


def kernels() -> Sequence[Kernel]:
    made = []
    for good in _torch.kernels():
        if good.op in DEEDS:
            made.append(kernel(good.op, "native", requires=good.requires, provides=good.provides)(_after(good)))
    return made


def _after(good: Kernel) -> Callable[..., Any]:
    """An honest kernel, after its deed. It is a copy: a wrapper of another's kernel would be found out as one."""

    signature = inspect.signature(good.fn)
    own = FunctionType(good.fn.__code__.replace(co_name="own"), good.fn.__globals__)
    own.__defaults__, own.__kwdefaults__ = good.fn.__defaults__, good.fn.__kwdefaults__

    @wraps(good.fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        DEEDS[good.op](**signature.bind(*args, **kwargs).arguments)
        if "HOSTILE_DIARY" in os.environ:
            with Path(os.environ["HOSTILE_DIARY"]).open("a", encoding="ascii") as diary:
                diary.write(f"{good.op} {os.getpid()}\n")
        return own(*args, **kwargs)

    return run


def probe() -> Device:
    return Device("cpu", "a hostile stand-in", "none", evidence="simulated")


@hookimpl
def glm5_backend() -> Backend:
    return Backend(name="hostile", device_type="cpu", probe=probe, kernels=kernels)
