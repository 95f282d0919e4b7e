"""The emulator of npu ops: how it is installed, what it refuses, and that it agrees with a real torch_npu's shapes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from ci.ascend import emulator  # noqa: E402
from ci.ascend.emulator.samples import SAMPLES, sample  # noqa: E402


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    emulator.install()
    yield
    emulator.uninstall()


def op(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.npu, base), overload or "default")


def test_every_schema_has_a_kernel_and_the_other_way_round() -> None:
    assert set(emulator.schemas()) == set(emulator.kernels())


def test_the_registered_schemas_are_the_vendor_s_to_the_letter() -> None:
    for name, schema in emulator.schemas().items():
        base, _, overload = name.partition(".")
        found = torch._C._jit_get_schemas_for_operator(f"npu::{base}")
        assert [str(one) for one in found if one.overload_name == overload] == [schema]


def test_installing_twice_changes_the_settings_alone() -> None:
    emulator.install(soc="Ascend950")
    with pytest.raises(emulator.ConstraintError, match="Ascend950"):
        op("npu_rms_norm")(**sample("npu_rms_norm"))
    emulator.install()
    op("npu_rms_norm")(**sample("npu_rms_norm"))


def test_uninstalled_kernels_are_gone_and_can_come_back() -> None:
    emulator.uninstall()
    with pytest.raises((AttributeError, NotImplementedError)):
        torch.ops.npu.npu_rms_norm(**sample("npu_rms_norm"))
    emulator.install()
    torch.ops.npu.npu_rms_norm(**sample("npu_rms_norm"))


def test_an_unknown_chip_is_named() -> None:
    with pytest.raises(ValueError, match="'A9'"):
        emulator.install(soc="A9")


def test_a_refusal_says_op_constraint_value_and_document() -> None:
    with pytest.raises(emulator.ConstraintError) as refused:
        op("npu_swiglu")(torch.randn(4, 3))
    error = refused.value
    assert isinstance(error, RuntimeError)
    assert error.op == "npu_swiglu"
    assert str(error) == (
        "npu_swiglu: input's size along dim is even; given float32[4, 3]; "
        "see op-plugin docs/zh/custom_APIs/torch_npu/（beta）torch_npu-npu_swiglu.md"
    )


@pytest.mark.parametrize(("name", "chip"), [("npu_swiglu", "A3"), ("npu_moe_finalize_routing", "A3"),
                                            ("npu_moe_gating_top_k", "Ascend950")])  # fmt: skip
def test_a_chip_that_the_page_does_not_list_is_refused_unless_asked_for(name: str, chip: str) -> None:
    emulator.install(soc=chip)
    with pytest.raises(emulator.ConstraintError, match="product table"):
        op(name)(**sample(name))
    emulator.install(soc=chip, listed_only=False)
    op(name)(**sample(name))


CALLS = [(name, case) for name, cases in SAMPLES.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), CALLS)
def test_a_call_does_not_depend_on_what_undefined_memory_holds(name: str, case: str) -> None:
    """The same call twice gives the same bits, NaN where an output is undefined included."""
    first, second = (op(name)(**sample(name, case)) for _ in range(2))
    pair = zip(*([one] if isinstance(one, torch.Tensor) else one for one in (first, second)), strict=True)
    assert all(torch.equal(a.nan_to_num(7e3), b.nan_to_num(7e3)) for a, b in pair)


#: Ops that write to an argument, as schema or page says.
WRITES = {
    "npu_scatter_nd_update_": {"input"},
    "npu_kv_rmsnorm_rope_cache": {"k_cache", "ckv_cache"},
    "npu_mla_prolog_v3": {"kv_cache", "kr_cache"},
}


@pytest.mark.parametrize(("name", "case"), CALLS)
def test_only_what_the_documents_name_is_written(name: str, case: str) -> None:
    before, given = sample(name, case), sample(name, case)
    op(name)(**given)
    written = {key for key, value in given.items() if not same(value, before[key])}
    expected = WRITES.get(name, set())
    merged = "-3" in case and name == "npu_mla_prolog_v3"  # the rope lies in kv_cache there
    assert written == (expected - {"kr_cache"} if merged else expected)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_shapes_dtypes_and_schemas_are_those_of_a_real_torch_npu() -> None:
    if importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, "-m", "ci.ascend.emulator.against_torch_npu"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_format_is_remembered_and_values_stay() -> None:
    weight = torch.randn(32, 48)
    cast = torch.ops.npu.npu_format_cast(weight, 29)
    assert torch.equal(cast, weight)
    assert torch.ops.npu.get_npu_format(weight) == 2
    assert torch.ops.npu.get_npu_format(cast) == 29
    assert torch.ops.npu.get_npu_format(cast[:16]) == 29, "a view has its storage's format"
    assert torch.ops.npu.get_npu_format(cast.clone()) == 2
    assert torch.ops.npu.get_npu_format(torch.ops.npu.npu_format_cast(cast, 2)) == 2
    assert torch.ops.npu.get_npu_format(torch.ops.npu.npu_format_cast.Tensor(weight, cast)) == 29


def test_a_format_does_not_outlive_its_tensor() -> None:
    for _ in range(64):
        torch.ops.npu.npu_format_cast(torch.randn(64, 64), 29)
        assert torch.ops.npu.get_npu_format(torch.randn(64, 64)) == 2


@pytest.mark.parametrize(
    ("chip", "arguments", "words"),
    [
        ("A2", {"input": torch.randn(4, 4), "acl_format": 5}, "acl_format is one of"),
        ("A2", {"input": torch.randn(4), "acl_format": 29}, "at least 2 dims"),
        ("Ascend950", {"input": torch.randn(4, 4), "acl_format": 29, "customize_dtype": 3}, "for A2 and A3"),
        ("Ascend950", {"input": torch.randn(1, 4).half(), "acl_format": 29}, "k of .k, n. is not 1"),
    ],
)
def test_format_casts_that_are_refused(chip: str, arguments: dict[str, Any], words: str) -> None:
    emulator.install(soc=chip)
    with pytest.raises(emulator.ConstraintError, match=words):
        op("npu_format_cast")(**arguments)


def test_a_documented_format_that_is_left_out_says_so() -> None:
    with pytest.raises(emulator.NotEmulatedError, match="format 3"):
        torch.ops.npu.npu_format_cast(torch.randn(4, 4, 4, 4), 3)
