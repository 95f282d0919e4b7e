"""glm5-hal: the operators of GLM-5 class models on every accelerator.

>>> import glm5_hal
>>> y = glm5_hal.ops.rms_norm(x, weight, eps=1e-5)      # served by the backend that GLM5_BACKEND names
>>> with glm5_hal.use("cpu:torch", require="deterministic"):
...     indices = glm5_hal.ops.topk_indices(scores, seq_lens, top_k=2048)
>>> print(glm5_hal.explain("topk_indices", top_k=4096))  # every candidate, and why it is or is not taken

Importing this loads no torch and no vendor's software: names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "glm5_hal":
    raise ImportError("import glm5_hal; the folder's bare name is not a package")

__version__ = "0.1.0"

_HOME = {
    "use": "context",
    "reset": "context",
    "explain": "explanation",
    "HalError": "errors",
    "watch": "observe",
    "counts": "observe",
    "clear_counts": "observe",
    "hookimpl": "hookspecs",
    "Backend": "backend",
    "Device": "backend",
    "Unavailable": "backend",
    "Kernel": "backend",
    "kernel": "backend",
    "kernels_of": "backend",
    "StepPlan": "plan",
    "CacheFormat": "formats",
    "Prepared": "prepared",
    "cache_format": "formats",
    "preferred_formats": "formats",
    "prepare": "prepared",
    "rope_tables": "rope",
}

__all__ = ["__version__", "ops", *_HOME]

if TYPE_CHECKING:  # `as` re-exports them: type checkers cannot read a starred __all__
    from glm5_hal import ops as ops
    from glm5_hal.backend import Backend as Backend
    from glm5_hal.backend import Device as Device
    from glm5_hal.backend import Kernel as Kernel
    from glm5_hal.backend import Unavailable as Unavailable
    from glm5_hal.backend import kernel as kernel
    from glm5_hal.backend import kernels_of as kernels_of
    from glm5_hal.context import reset as reset
    from glm5_hal.context import use as use
    from glm5_hal.errors import HalError as HalError
    from glm5_hal.explanation import explain as explain
    from glm5_hal.formats import CacheFormat as CacheFormat
    from glm5_hal.formats import cache_format as cache_format
    from glm5_hal.formats import preferred_formats as preferred_formats
    from glm5_hal.hookspecs import hookimpl as hookimpl
    from glm5_hal.observe import clear_counts as clear_counts
    from glm5_hal.observe import counts as counts
    from glm5_hal.observe import watch as watch
    from glm5_hal.plan import StepPlan as StepPlan
    from glm5_hal.prepared import Prepared as Prepared
    from glm5_hal.prepared import prepare as prepare
    from glm5_hal.rope import rope_tables as rope_tables


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("glm5_hal.ops")
    if name in _HOME:
        value = globals()[name] = getattr(importlib.import_module(f"glm5_hal.{_HOME[name]}"), name)
        return value
    raise AttributeError(f"module 'glm5_hal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
