"""The shared Triton kernels on a CPU, in Triton's interpreter: a backend for tests, evidence "interpreted".

    glm5-hal conformance run --plugin ci/triton_interpreter.py --backend triton-interpreter --level smoke

It shows that the kernels' arithmetic and indexing are right. It shows nothing of speed, of races between programs (they
run one after the other), nor of what a compiler makes of them: ``ci/triton_compile.py`` is for that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from glm5_hal.backend import Backend, Device, Kernel, Unavailable
from glm5_hal.hookspecs import hookimpl

TUNING = Path(__file__).with_name("triton_interpreter.toml")


def probe() -> Device | Unavailable:
    from glm5_hal.backends import _triton

    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined; a process either interprets or compiles
    try:
        import triton
    except ImportError as problem:
        return Unavailable(f"Triton cannot be imported: {problem}", "pip install triton")
    if not interpreting and any(f"{_triton.__name__}.{family}" in sys.modules for family in _triton.FAMILIES):
        return Unavailable("the kernels were defined for a compiler before", "set TRITON_INTERPRET=1 from the start")
    sys.path.insert(0, str(Path(__file__).parent))
    import triton_repairs

    triton_repairs.apply()
    return Device("cpu", "Triton's interpreter", "interpreter", 1, "interpreted", {"triton": triton.__version__})


def kernels() -> Sequence[Kernel]:
    from glm5_hal.backends import _triton
    from glm5_hal.backends._triton.tuning import tuning

    return _triton.kernels(tuning("interpreter", TUNING))


@hookimpl
def glm5_backend() -> Backend:
    return Backend(
        name="triton-interpreter",
        device_type="cpu",
        probe=probe,
        kernels=kernels,
        cache_formats={
            "latent": ("latent_576", "latent_512_rope_64", "fp8_656", "fp8_656_ascend"),
            "index": ("bf16_128", "fp8_132"),
        },
    )
