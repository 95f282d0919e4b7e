"""Other people's kernels, which may be there or not. What is there and cannot be used is offered with a requirement
that says why, so that ``explain`` does; what is not installed at all is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter

from glm5_hal.backend import Kernel, kernels_of
from glm5_hal.backends._triton.offered import never


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
