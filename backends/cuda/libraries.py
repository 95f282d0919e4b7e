"""Software that may be there or not: other people's kernels, and Triton. What cannot be used is offered with a
requirement that says why, so that ``explain`` does; what is not installed at all is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from glm5_hal.backend import Kernel, kernels_of
from glm5_hal.capability import package, when
from glm5_hal.decision import Requirement
from glm5_hal.errors import HalError
from glm5_hal.packages import package_problem
from glm5_hal.spec import OpSpec

TRITON = ">=3.2"


@dataclass(frozen=True)
class Library:
    """An importable module with kernels; the module of this package that has its name adapts them.

    Attributes:
        needs: what it must have. An older one lacks some of it, and has other conventions.
        install: the command that brings it.
    """

    module: str
    needs: tuple[str, ...]
    install: str

    def problem(self) -> str:
        """Why it cannot be used; "" where it can."""
        try:
            module = import_module(self.module)
        except Exception as problem:  # noqa: BLE001 - compiled for another torch, it may raise anything
            return f"{self.module} cannot be imported: {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        for name in self.needs:
            try:
                attrgetter(name)(module)
            except AttributeError:
                return f"{self.module} has no {name}: it is older than its adapter"
        return ""


LIBRARIES = (
    Library(
        "flash_mla",
        # With FlashMLASchedMeta came the natural logarithm: before, flash_mla_sparse_fwd gave an lse of base 2.
        ("flash_mla_sparse_fwd", "flash_mla_with_kvcache", "get_mla_metadata", "flash_mla_interface.FlashMLASchedMeta"),
        "pip install -U git+https://github.com/deepseek-ai/FlashMLA",
    ),
    Library(
        "deep_gemm",
        ("m_grouped_bf16_gemm_nt_contiguous", "get_m_alignment_for_contiguous_layout"),
        "pip install -U git+https://github.com/deepseek-ai/DeepGEMM",
    ),
)


def adapted() -> Sequence[Kernel]:
    """Kernels of the libraries that are installed."""
    found: list[Kernel] = []
    for library in LIBRARIES:
        if find_spec(library.module) is not None:
            kernels, problem = kernels_of(import_module(f"{__package__}.{library.module}")), library.problem()
            refusal = (never(problem, library.install),) if problem else ()
            found += (replace(kernel, requires=(*refusal, *kernel.requires)) for kernel in kernels)
    return found


def triton(arch: str, tuning_file: Path) -> Sequence[Kernel]:
    """The shared Triton kernels, for this architecture."""
    from glm5_hal.backends import _triton
    from glm5_hal.backends._triton.tuning import tuning

    try:
        version: str = import_module("triton").__version__
        if (problem := package_problem("triton", TRITON, {"triton": version})) is None:
            return _triton.kernels(tuning(arch, tuning_file))
    except ImportError as missing:
        problem = f"Triton's kernels cannot be imported: {missing}"
    told = package_problem("triton", TRITON) is not None
    return _absent(package("triton", TRITON) if told else never(problem, f"pip install 'triton{TRITON}'"))


def never(reason: str, fix: str) -> Requirement:
    return when(lambda call: False, reason, fix, reads=())


def _absent(requirement: Requirement) -> Sequence[Kernel]:
    """In place of Triton's kernels, which cannot be listed without it: what they would need."""
    from glm5_hal.ops import specs

    return [
        Kernel(name, "triton", _nobody(spec), (requirement,)) for name, spec in specs().items() if not spec.composite
    ]


def _nobody(spec: OpSpec) -> Callable[..., Any]:
    def nobody(*args: Any, **kwargs: Any) -> Any:
        raise HalError("UNAVAILABLE", f"{spec.name}: Triton is not there", fix=f"pip install 'triton{TRITON}'")

    nobody.__signature__ = spec.signature  # type: ignore[attr-defined]
    return nobody
