"""Each vendor's Triton kernels, with that vendor's tuning file, interpreted on CPU tensors, in a process of its own.

python interpreted.py VENDOR    prints one JSON object: of each case its verdict, and which wide types it used
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
import triton.language as tl
import triton_repairs
from toys import installed, stand_in
from triton.runtime import interpreter

from glm5_hal.backend import Device
from glm5_hal.backends import _triton
from glm5_hal.backends._triton.tuning import tuning
from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import Case, cases
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.subject import prepared
from glm5_hal.conformance.target import targets

#: What is looked at: few programs each, of every family of kernels.
CASES = (
    "rms_norm[bfloat16-uneven]",
    "rms_norm[float64-tokens]",
    "rope[bfloat16-one_pair-interleaved]",
    "silu_and_mul[bfloat16-uneven]",
    "hadamard[bfloat16-rows-16]",
    "mla_cache_write[bfloat16-rows-fp8_656]",
    "index_cache_write[bfloat16-rows-bf16_128]",
    "topk_indices[bfloat16-ties]",
    "moe_route[float32-biased]",
    "moe_permute[bfloat16-tokens]",
    "moe_combine[bfloat16-tokens]",
    "grouped_gemm[bfloat16-ragged]",
    "mla_decode[bfloat16-decode-latent_576]",
    "sparse_mla[bfloat16-decode-latent_576]",
    "indexer_logits[bfloat16-decode-bf16_128]",
)
JUDGED = ("accuracy", "form", "integrity", "rerun")
WIDE = (tl.float64, tl.int64, tl.uint64)

_used: set[str] = set()


def note_wide_types() -> None:
    """Whatever an interpreted kernel computes with passes here, but for the interpreter's own search for overflows."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    before = interpreter.TensorHandle.__post_init__

    def noted(self: Any) -> None:
        if self.dtype.scalar in WIDE:
            _used.add(str(self.dtype.scalar))
        before(self)

    interpreter.TensorHandle.__post_init__ = noted


def main(*vendors: str) -> None:
    triton_repairs.apply()
    note_wide_types()
    by_id = {case.id: case for case in cases("full")}
    subjects = {name: prepared(by_id[name], 0) for name in CASES}
    found = {vendor: dict(judged(vendor, by_id, subjects)) for vendor in vendors}
    sys.stdout.write(json.dumps(found))


def judged(vendor: str, by_id: Mapping[str, Case], subjects: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    file = import_module(f"glm5_hal.backends.{vendor}").TUNING
    kernels = _triton.kernels(tuning("any", file))
    found = Device("cpu", "Triton's interpreter", "any", evidence="interpreted")
    with installed(stand_in(vendor, kernels, probe=lambda: found, builtin=True)):
        (target,) = targets(f"{vendor}:triton")
        for name, subject in subjects.items():
            _used.clear()
            asked = {check: CHECKS[check] for check in JUDGED}
            result = runner.run_case(subject, by_id[name], target, 0, checks=asked)
            yield name, {"verdict": result.verdict, "detail": result.detail, "wide": sorted(_used)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
