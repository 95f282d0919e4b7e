"""Where a document names a generation, the adapters work by that generation's limits; docs/ascend.md says the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from glm5_hal.backend import Kernel
from glm5_hal.backends import ascend
from glm5_hal.backends.ascend import needs
from glm5_hal.ops import specs

from .emulation import DENSE, HEADS, INDEXER, PROLOG, ROOT, SPARSE, adapter, call, emulator

KERNELS = {kernel.op: kernel for kernel in ascend.aclnn()}
GENERATIONS = (needs.A2, needs.A3, needs.A5)

#: A call that every generation takes which has the op.
CALLS: dict[str, dict[str, Any]] = {
    "rms_norm": {"T": 5, "D": 96},
    "add_rms_norm": {"T": 5, "D": 96},
    "rope": {"shape": (5, 3, 24), "layout": "interleaved"},
    "silu_and_mul": {"shape": (5, 192)},
    "mla_cache_write": {"T": 9, "L": 256, "R": 16, "N": 4, "page": 8, "format": "latent_576"},
    "index_cache_write": {"T": 9, "D": 128, "N": 4, "page": 8, "format": "bf16_128"},
    "lightning_indexer": {**INDEXER, "lens": ((2, 40),)},
    "sparse_mla": {**SPARSE, "lens": ((2, 40),)},
    "mla_decode": {**DENSE, "lens": ((2, 40),)},
    "mla_prefill": {**HEADS, "lens": ((4, 9),)},
    "mla_prolog": PROLOG,
    "moe_route": {"T": 9, "E": 48, "top_k": 6, "routed_scaling_factor": 2.5},
    "moe_permute": {"T": 13, "K": 3, "D": 40, "E": 7},
    "grouped_gemm": {"N": 24, "K": 40, "rows": (3, 0, 13, 1, 0)},
    "moe_combine": {"T": 11, "K": 4, "D": 72},
    "moe_experts": {"T": 13, "K": 3, "D": 64, "I": 40, "E": 7},
}

#: The page of torch_npu names A2 alone; CANN's of the function beneath names A3 too.
BENEATH = {"silu_and_mul", "moe_combine", "moe_experts"}


def named(kernel: Kernel) -> tuple[str, ...]:
    """The generations that a kernel is for."""
    (allowed,) = (r.allowed for r in kernel.requires if type(r).__name__ == "_Arch")
    return tuple(allowed)


@pytest.fixture(autouse=True)
def _afterwards() -> Iterator[None]:
    yield
    emulator.install()


@pytest.mark.parametrize(("op", "arch"), [(op, arch) for op in CALLS for arch in named(KERNELS[op])])
def test_an_op_works_where_it_is_named(op: str, arch: str) -> None:
    run, args = adapter(op), call(op, CALLS[op], "float32" if op == "moe_route" else "bfloat16")
    emulator.install(arch, listed_only=not (op in BENEATH and arch == needs.A3))
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in args.items()}
    wanted = specs()[op].emulate or specs()[op].reference
    if specs()[op].composite:
        assert run(**given) is not None
        return
    made, right = run(**given), wanted(**args)
    pairs = zip(made, right, strict=True) if isinstance(made, tuple) else [(made, right)] if made is not None else []
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03)
    for name in specs()[op].mutates:
        if args[name] is not None:
            assert torch.equal(given[name], args[name])


def rows() -> dict[str, list[str]]:
    """The table of docs/ascend.md, by op."""
    text = (ROOT / "docs/ascend.md").read_text(encoding="utf-8")
    table = text.partition("## What runs where")[2].partition("\n\nAn entry is")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "`" in line]
    return {op: row for row in cells for op in re.findall(r"`(\w+)`", row[0])}


def test_the_documents_table_has_every_op_and_names_the_same_generations() -> None:
    table = rows()
    assert set(table) == set(specs())
    for op, (_, _, elder, newest, _) in table.items():
        kernel = KERNELS.get(op)
        generations = named(kernel) if kernel else ()
        assert (elder in ("aclnn", "not GLM-5's")) == (needs.A2 in generations and needs.A3 in generations), op
        assert (newest == "aclnn") == (needs.A5 in generations), op


def test_the_documents_table_names_the_vendors_ops() -> None:
    for op, kernel in KERNELS.items():
        asked = {r.name for r in kernel.requires if type(r).__name__ == "_Feature"}
        named_there = set(re.findall(r"`(npu_\w+)`", rows()[op][1]))
        assert named_there <= asked, op
        assert named_there or op == "moe_experts"
