"""What the vendor's ops do not take is told with its reason and with what to change; what GLM-5 asks is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from toys import installed, stand_in

from glm5_hal import explain
from glm5_hal.backend import Device
from glm5_hal.backends import ascend
from glm5_hal.backends.ascend import needs
from glm5_hal.catalogue import Catalogue
from glm5_hal.ops import specs


@contextmanager
def npu(arch: str = "A2", features: frozenset[str] = frozenset(needs.OPS)) -> Iterator[Catalogue]:
    """The backend's kernels as on a chip, where no torch_npu is installed."""
    found = Device("cpu", "made up", arch, evidence="simulated", features=features)
    with installed(stand_in("ascend", ascend.kernels, probe=lambda: found, builtin=True)) as catalogue:
        yield catalogue


def answer(op: str, machine: dict[str, Any] | None = None, **call: Any) -> dict[str, Any]:
    """What the aclnn kernel says of a call."""
    with npu(**machine or {}):
        trace = explain(op, **call).resolution.trace
    (step,) = (step.as_dict() for step in trace if step.candidate == "ascend:aclnn")
    return dict(step)


APART = {"cache_format": "latent_512_rope_64", "X": 512, "R": 64}
LATENT = {"dtype": "bfloat16", "H": 64, "W": 576, "kv_lora_rank": 512, "P": 128, **APART}
INDEXER = {"dtype": "bfloat16", "H": 32, "D": 128, "X": 128, "P": 128, "top_k": 2048}
PROLOG = {"dtype": "bfloat16", "E": 6144, "Q": 2048, "H": 64, "K": 192, "L": 512, "I": 32, "weight_format": "ascend_nz"}
PROLOG = {**PROLOG, "cache_format": "latent_576", "X": 576}

#: GLM-5's own calls.
TAKEN: dict[str, dict[str, Any]] = {
    "rms_norm": {"dtype": "bfloat16", "D": 6144},
    "add_rms_norm": {"dtype": "bfloat16", "D": 6144},
    "rope": {"dtype": "bfloat16", "R": 64},
    "silu_and_mul": {"dtype": "bfloat16", "D2": 4096},
    "mla_cache_write": {"dtype": "bfloat16", "L": 512, **APART},
    "index_cache_write": {"dtype": "bfloat16", "D": 128, "X": 128},
    "lightning_indexer": INDEXER,
    "sparse_mla": {**LATENT, "K": 2048},
    "mla_decode": LATENT,
    "mla_prolog": PROLOG,
    "moe_route": {"dtype": "float32", "E": 256, "top_k": 8},
    "moe_permute": {"dtype": "bfloat16", "num_experts": 256, "D": 6144},
    "grouped_gemm": {"dtype": "bfloat16", "E": 8, "N": 4096, "K": 6144},
    "moe_combine": {"dtype": "bfloat16", "K": 8, "D": 6144},
    "moe_experts": {"dtype": "bfloat16", "E": 8, "K": 8, "D": 6144, "I": 2048},
}


@pytest.mark.parametrize("op", TAKEN)
@pytest.mark.parametrize("arch", ["A2", "A3"])
def test_what_glm5_asks_is_taken(op: str, arch: str) -> None:
    assert answer(op, {"arch": arch}, **TAKEN[op])["accepted"]


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("mla_prefill", {"dtype": "bfloat16", "H": 64, "Dqk": 256, "Dv": 256}, "GLM-5 has 256 and 256", "triton or torch"),
    ("mla_decode", {**LATENT, "P": 24}, "a multiple of 16 keys", "page_size of 128"),
    ("mla_decode", {**LATENT, "P": 2048}, "1024 at most", "page_size of 128"),
    ("mla_decode", {**LATENT, "H": 96}, "H must be one of 1, 2, 4, 8", "use H=1"),
    ("mla_decode", {**LATENT, "dtype": "float32"}, "q is float32", "convert q to bfloat16"),
    ("mla_decode", {**LATENT, "cache_format": "latent_576", "X": 576, "R": None}, "'latent_576'", "latent_512_rope_64"),
    ("sparse_mla", {**LATENT, "W": 192, "kv_lora_rank": 128, "X": 128}, "kv_lora_rank must be one of 512", "512"),
    ("lightning_indexer", {**INDEXER, "P": 8}, "a multiple of 16 keys", "page_size of 128"),
    ("lightning_indexer", {**INDEXER, "D": 256, "X": 256}, "D must be one of 128", "D=128"),
    ("lightning_indexer", {**INDEXER, "H": 96}, "H must be <= 64", "H=64"),
    ("lightning_indexer", {**INDEXER, "top_k": 2500}, "top_k is 2048 at most, or one of 3072", "top_k=2048"),
    ("mla_prolog", {**PROLOG, "weight_format": "plain"}, "weight_format 'ascend_nz'", "glm5_hal.prepare('mla_prolog'"),
    ("mla_prolog", {**PROLOG, "E": 5000}, "documented", "leave the weights plain"),
    ("mla_prolog", {**PROLOG, "layout": "half"}, "layout must be one of 'interleaved'", "interleaved"),
    ("mla_prolog", {**PROLOG, "dtype": "float16"}, "x is float16", "convert x to bfloat16"),
    (
        "moe_route",
        {"dtype": "float32", "scoring_func": "softmax"},
        "norm_topk_prob goes with sigmoid",
        "GLM-5 has both",
    ),
    ("moe_route", {"dtype": "float32", "norm_topk_prob": False}, "norm_topk_prob goes with sigmoid", "GLM-5 has both"),
    ("moe_route", {"dtype": "float32", "E": 4096}, "E must be <= 2048", "E=2048"),
    ("moe_route", {"dtype": "float64"}, "router_logits is float64", "float32"),
    ("grouped_gemm", {"dtype": "bfloat16", "E": 2000}, "E must be <= 1024", "E=1024"),
    ("mla_cache_write", {"cache_format": "fp8_656", "L": 512, "R": 64, "X": 656}, "'latent_512_rope_64'", "latent_512"),
    ("index_cache_write", {"cache_format": "fp8_132", "D": 128, "X": 132}, "'bf16_128'", "bf16_128"),
    ("sparse_mla", {**LATENT, "R": None, "cache_format": "fp8_656", "X": 656}, "'latent_512_rope_64'", "latent_512"),
    ("rms_norm", {"dtype": "float64"}, "x is float64", "convert x to bfloat16"),
]


@pytest.mark.parametrize(("op", "call", "reason", "fix"), REFUSED)
def test_what_it_does_not_take_is_told(op: str, call: dict[str, Any], reason: str, fix: str) -> None:
    told = answer(op, **{name: value for name, value in call.items() if value is not None})
    assert not told["accepted"]
    assert reason in told["detail"]
    assert fix in told["fix"]


def test_a_chip_that_an_op_is_not_documented_for() -> None:
    told = answer("lightning_indexer", {"arch": "Ascend950"}, **INDEXER)
    assert told["detail"] == "this kernel is for A2 or A3, the device is Ascend950"
    assert answer("sparse_mla", {"arch": "Ascend950"}, **{**LATENT, "K": 2048})["accepted"]


def test_a_torch_npu_that_lacks_an_op() -> None:
    old = frozenset(needs.OPS) - {"npu_mla_prolog_v3"}
    told = answer("mla_prolog", {"features": old}, **PROLOG)
    assert told["detail"] == "the device or its software lacks npu_mla_prolog_v3"
    assert "torch_npu" in told["fix"]


def test_what_is_refused_is_served_by_triton_or_torch() -> None:
    for op, call, _, _ in REFUSED:
        if specs()[op].composite:
            continue
        with npu():
            given = {name: value for name, value in call.items() if value is not None}
            chosen = explain(op, **given).resolution.chosen
        assert chosen is not None, op
        assert chosen.name in ("ascend:triton", "ascend:torch")


def test_every_kernel_has_its_ops_signature_and_claims_what_the_op_knows() -> None:
    with npu() as catalogue:
        kernels = [kernel for kernel in catalogue.all_kernels("ascend") if kernel.provider == "aclnn"]
    assert {kernel.op for kernel in kernels} == {*TAKEN, "mla_prefill"}
    for kernel in kernels:
        assert kernel.provides <= set(specs()[kernel.op].attributes)


def test_every_op_of_the_vendor_that_is_called_is_asked_for() -> None:
    """By a kernel: a torch_npu without it is refused, and not found out in the middle of a step."""
    asked = {r.name for kernel in ascend.aclnn() for r in kernel.requires if type(r).__name__ == "_Feature"}
    assert asked == set(needs.OPS)
