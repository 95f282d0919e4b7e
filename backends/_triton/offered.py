"""The shared Triton kernels as a backend offers them: all of them where Triton can be used, and what they would need
where it cannot, so that ``explain`` says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from glm5_hal.backend import Kernel
from glm5_hal.capability import package, when
from glm5_hal.decision import Requirement
from glm5_hal.errors import HalError
from glm5_hal.packages import package_problem
from glm5_hal.spec import OpSpec

TRITON = ">=3.2"


def offered(arch: str, file: Path, build: str = "") -> Sequence[Kernel]:
    """For an architecture, with a tuning file. ``build`` says what brings a Triton that compiles for it; "" where that
    is the one that everybody installs."""
    from glm5_hal.backends import _triton
    from glm5_hal.backends._triton.tuning import tuning

    try:
        version: str = import_module("triton").__version__
        if (problem := package_problem("triton", TRITON, {"triton": version})) is None:
            return _triton.kernels(tuning(arch, file))
    except (ImportError, AttributeError) as missing:  # a folder of that name is a package too, without a version
        problem = f"Triton's kernels cannot be imported: {missing}"
    fix = build or f"pip install 'triton{TRITON}'"
    by_metadata = package_problem("triton", TRITON)
    if by_metadata is not None and not build:
        return _absent(package("triton", TRITON), fix)
    return _absent(never(by_metadata or problem, fix), fix)


def never(reason: str, fix: str) -> Requirement:
    """What nothing meets."""
    return when(lambda call: False, reason, fix, reads=())


def _absent(requirement: Requirement, fix: str) -> Sequence[Kernel]:
    """In place of Triton's kernels, which cannot be listed without it: what they would need."""
    from glm5_hal.ops import specs

    return [
        Kernel(name, "triton", _nobody(spec, fix), (requirement,))
        for name, spec in specs().items()
        if not spec.composite
    ]


def _nobody(spec: OpSpec, fix: str) -> Callable[..., Any]:
    def nobody(*args: Any, **kwargs: Any) -> Any:
        raise HalError("UNAVAILABLE", f"{spec.name}: Triton is not there", fix=fix)

    nobody.__signature__ = spec.signature  # type: ignore[attr-defined]
    return nobody
