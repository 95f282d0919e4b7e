"""Weights are prepared once, in the vendor's format, where its fused op takes them; all others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from toys import installed, stand_in

from glm5_hal.backend import Device
from glm5_hal.backends import ascend
from glm5_hal.backends.ascend import weights
from glm5_hal.prepared import Prepared, prepare

from .emulation import emulated


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    emulated.kernels()  # the vendor's ops
    record = stand_in("ascend", ascend.aclnn, probe=lambda: Device("cpu", "made up", "A2"), prepare=ascend.prepare)
    with installed(record):
        yield


def prolog(dtype: torch.dtype = torch.bfloat16, hidden: int = 1024) -> dict[str, Any]:
    shapes = {"w_q_a": (1536, hidden), "w_q_b": (2 * 192, 1536), "w_kv_a": (576, hidden), "w_uk": (2, 128, 512)}
    return {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}


def number(tensor: torch.Tensor) -> int:
    return int(torch.ops.npu.get_npu_format(tensor))


def test_the_prologs_projections_are_in_fractal_nz() -> None:
    plain = prolog()
    made = prepare("mla_prolog", plain, backend="ascend")
    assert made.format == "ascend_nz"
    for name in ("w_q_a", "w_q_b", "w_kv_a"):
        assert made[name].shape == plain[name].shape  # of [out, in]
        assert number(made[name].transpose(0, 1)) == weights.FRACTAL_NZ  # which is [in, out]
    assert torch.equal(made["w_uk"], plain["w_uk"])


@pytest.mark.parametrize(
    "given",
    [prolog(torch.float16), prolog(hidden=1000), {"w_q_a": torch.zeros(1536, 1024, dtype=torch.bfloat16)}],
    ids=["float16", "an undocumented hidden size", "not all of them"],
)
def test_what_the_fused_op_does_not_take_stays_plain(given: dict[str, Any]) -> None:
    """So that the op's parts can use it."""
    made = prepare("mla_prolog", given, backend="ascend")
    assert made.format == "plain"
    assert all(torch.equal(made[name], tensor) for name, tensor in given.items())


def test_other_ops_weights_stay_plain() -> None:
    experts = {"w_gate_up": torch.zeros(2, 8, 4), "w_down": torch.zeros(2, 4, 4)}
    assert prepare("moe_experts", experts, backend="ascend").format == "plain"


def test_torch_npu_is_told_that_it_may_keep_such_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    class Settings:
        allow_internal_format = False

    class Namespace:
        config = Settings()

    monkeypatch.setattr(torch, "npu", Namespace, raising=False)
    made = ascend.prepare("mla_prolog", prolog())
    assert isinstance(made, Prepared)
    assert Namespace.config.allow_internal_format is True
