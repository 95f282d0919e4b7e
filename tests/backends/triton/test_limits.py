"""Where a chip has no 64-bit integers, no address may need them: of what a call has, makes, or needs in between."""

from __future__ import annotations

from pathlib import Path

import judging
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from glm5_hal.backend import Kernel
from glm5_hal.backends import _triton
from glm5_hal.backends._triton.tuning import tuning


@pytest.fixture(params=[False, True], ids=["int32 only", "int64"])
def int64(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def kernel(op: str, int64: bool, folder: Path) -> Kernel:
    file = folder / "tuning.toml"
    file.write_text(f"[limits]\nint64 = {str(int64).lower()}\n")
    return next(k for k in _triton.kernels(tuning("any", file)) if k.op == op)


def accepted(kernel: Kernel, **args: object) -> bool:
    return judging.accepts(kernel, args)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_small_call_is_for_every_chip(int64: bool, tmp_path: Path) -> None:
    assert accepted(kernel("silu_and_mul", int64, tmp_path), x=meta(8, 4096))


def test_a_large_tensor_is_not(int64: bool, tmp_path: Path) -> None:
    assert accepted(kernel("silu_and_mul", int64, tmp_path), x=meta(2**20, 4096)) == int64


def test_nor_a_small_one_whose_rows_lie_far_apart(int64: bool, tmp_path: Path) -> None:
    far = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided((8, 64), (2**29, 1))
    assert accepted(kernel("silu_and_mul", int64, tmp_path), x=far) == int64


def test_nor_a_large_result(int64: bool, tmp_path: Path) -> None:
    x, ids = meta(2**16, 6144), meta(2**16, 8, dtype=torch.int32)
    assert accepted(kernel("moe_permute", int64, tmp_path), x=x, topk_ids=ids, num_experts=8) == int64


def test_nor_a_large_tensor_in_between(int64: bool, tmp_path: Path) -> None:
    T, K, D, E = 2**16, 8, 6144, 2
    call = {
        "x": meta(T, D), "topk_weights": meta(T, K, dtype=torch.float32), "topk_ids": meta(T, K, dtype=torch.int32),
        "w_gate_up": meta(E, 128, D), "w_down": meta(E, D, 64),
    }  # fmt: skip
    assert accepted(kernel("moe_experts", int64, tmp_path), **call) == int64
