"""Other people's kernels, which may be there or not. What is there and cannot be used is offered with a requirement
that says why, so that ``explain`` does; what is not installed at all is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from operator import attrgetter
from typing import Any

from glm5_hal.backend import Kernel, kernels_of
from glm5_hal.backends._probing import installed
from glm5_hal.backends._triton.offered import never
from glm5_hal.packages import package_problem


@dataclass(frozen=True)
class Library:
    """An importable module with kernels.

    Attributes:
        module: what is imported.
        needs: what it must have. An older one lacks some of it, and has other conventions.
        install: what brings it.
        versions: those that its adapter was written for (">=1.0.1"), where it says its version.
        without: what it must not have. A newer one has some of it, and other conventions.
        ops: what it registers under ``torch.ops`` when it is imported.
        adapter: the module that has the kernels, of the package that lists it; "" where it has the library's name.
    """

    module: str
    needs: tuple[str, ...]
    install: str
    versions: str = ""
    without: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    adapter: str = ""

    def problem(self) -> str:
        """Why it cannot be used; "" where it can."""
        try:
            module = import_module(self.module)
        except Exception as problem:  # noqa: BLE001 - compiled for another torch, it may raise anything
            return f"{self.module} cannot be imported: {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        for name in self.needs:
            if not _has(module, name):
                return f"{self.module} has no {name}: it is older than its adapter"
        for name in self.without:
            if _has(module, name):
                return f"{self.module} has {name}: it is newer than its adapter"
        for name in self.ops:
            if not _has(import_module("torch").ops, name):
                return f"{self.module} registers no {name}: it is older than its adapter"
        name = self.module.partition(".")[0]
        known = {name: str(getattr(import_module(name), "__version__", ""))}
        return (package_problem(name, self.versions, known) or "") if self.versions else ""


def _has(module: Any, name: str) -> bool:
    try:
        attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def adapted(package: str, libraries: Sequence[Library]) -> Sequence[Kernel]:
    """Kernels of those that are installed, by the adapters of ``package``."""
    found: list[Kernel] = []
    for library in libraries:
        if installed(library.module.partition(".")[0]):
            kernels = kernels_of(import_module(f"{package}.{library.adapter or library.module}"))
            problem = library.problem()
            refusal = (never(problem, library.install),) if problem else ()
            found += (replace(kernel, requires=(*refusal, *kernel.requires)) for kernel in kernels)
    return found
