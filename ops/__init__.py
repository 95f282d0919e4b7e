"""The operators. ``glm5_hal.ops.rms_norm(x, weight, eps=1e-5)`` dispatches to the backend that the policy names.

Each private module here declares the op of its own name (``_rms_norm.py``: ``rms_norm``) as one `OpSpec` called
``SPEC``; adding such a file is all it takes. What they share is in ``_common/``.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if __name__ != "glm5_hal.ops":
    raise ImportError("import glm5_hal.ops; the folder's bare name is not a package")

if TYPE_CHECKING:
    from glm5_hal.dispatch import Op
    from glm5_hal.spec import OpSpec

    def __getattr__(name: str) -> Op: ...

else:

    def __getattr__(name: str):
        if name.startswith("_") or name not in names():
            if name.startswith("_"):
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            from glm5_hal.errors import suggest

            raise AttributeError(f"no op {name!r}; {suggest(name, names())}")
        all_specs = specs()  # before dispatch: they import torch with care
        from glm5_hal.dispatch import make_op

        op = globals()[name] = make_op(all_specs[name])
        return op


@cache
def names() -> tuple[str, ...]:
    """Names of all ops, without importing them."""
    return tuple(sorted(m.name[1:] for m in pkgutil.iter_modules(__path__) if m.name.startswith("_") and not m.ispkg))


@cache
def specs() -> dict[str, OpSpec]:
    """The declaration of every op, by name. Raises HalError where torch cannot be imported."""
    from glm5_hal.autoload import import_torch

    import_torch()
    return {name: importlib.import_module(f"{__name__}._{name}").SPEC for name in names()}


def __dir__() -> list[str]:
    return [*names(), "names", "specs"]
