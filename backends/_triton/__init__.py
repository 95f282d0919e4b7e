"""Triton kernels that every vendor with a Triton compiler shares. A library, not a backend.

A backend calls :func:`kernels` with the tuning of its device; nothing here knows a vendor. Triton is imported then, not
before.
"""

from __future__ import annotations

from importlib import import_module

from glm5_hal.backend import Kernel
from glm5_hal.backends._triton.tuning import Tuning

#: One family of ops each; a new kernel goes into one of them, a new family is one more name.
FAMILIES = (
    "norms",
    "elementwise",
    "caches",
    "prefill",
    "decode",
    "sparse",
    "indexer",
    "topk",
    "lightning",
    "routing",
    "permuting",
    "grouped",
    "combining",
)


def kernels(tuning: Tuning) -> tuple[Kernel, ...]:
    """Every kernel, compiled at its first call for the device of its tensors, with the block sizes of ``tuning``."""
    from glm5_hal.backends._triton.declare import Declared

    modules = (import_module(f"{__name__}.{family}") for family in FAMILIES)
    declared = (value for module in modules for value in vars(module).values() if isinstance(value, Declared))
    return tuple(one.bound(tuning) for one in declared)
