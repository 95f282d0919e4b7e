"""Judges a Triton kernel, interpreted, with so small blocks that its loops run several times. A program of its own: a
process either interprets or compiles.

    python small_blocks.py OP PROVIDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CI = Path(__file__).resolve().parents[2] / "ci"

#: Samples that take a minute or more so.
LONG = ("far_columns", "many_rows")


def main(op: str, provider: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(CI))
    import triton_interpreter

    triton_interpreter.probe()  # from here on, kernels are interpreted

    import judging

    from glm5_hal.backends import _triton
    from glm5_hal.backends._triton.tuning import tuning

    small = _triton.kernels(tuning("interpreter", CI / "triton_interpreter_small.toml"))
    (kernel,) = (kernel for kernel in small if (kernel.op, kernel.provider) == (op, provider))
    first = [(sample, sample.dtypes[0]) for sample in judging.smoke(op) if sample.id not in LONG]
    taken = [(sample, dtype) for sample, dtype in first if judging.takes(kernel, sample, dtype)]
    assert len(taken) > 4
    problems = [_problem(judging.accurate, kernel, sample, dtype) for sample, dtype in taken]
    sys.exit("\n".join(filter(None, problems)) or None)


def _problem(accurate: Callable[..., None], kernel: Any, sample: Any, dtype: str) -> str:
    try:
        accurate(kernel, sample, dtype)
    except AssertionError as problem:
        return f"{sample.id}: {problem}"
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
