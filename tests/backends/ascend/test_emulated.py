"""The whole suite over the aclnn kernels and emulated ops: evidence "emulated"."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from .emulation import ROOT

PLUGIN = ROOT / "ci/ascend/emulated.py"

#: Failures that stand. A key with a NaN is never to be chosen; the document is silent on it, the vendor's test sorts
#: NaN first, and so does the emulator. docs/ascend.md says so.
NAN_KEYS = {"lightning_indexer[float16-many_keys]", "lightning_indexer[bfloat16-far_columns]"}

#: Ops that the vendor has nothing for, and those whose every sample of the smoke level has other widths than its ops.
NOTHING = {"hadamard", "indexer_logits", "topk_indices"}
WIDTHS = {"mla_decode", "mla_prefill", "sparse_mla"}

#: What a refusal may be for, by its code: an op that is not there, or a limit of a document.
REFUSALS = {"NOT_IMPLEMENTED", "DTYPE", "CHOICE", "LIMIT", "MINIMUM", "CONDITION", "STRIDE"}

Results = Mapping[str, Mapping[str, str]]


def run(level: str, out: Path, *more: str) -> Results:
    how = ("--plugin", str(PLUGIN), "--backend", "ascend-emulated", "--level", level, "--workers", "1", *more)
    command = [sys.executable, "-m", "glm5_hal", "conformance", "run", *how, "--timeout", "300", "--out", str(out)]
    subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    results = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {result["case"]: result for result in results}


def failed(results: Results) -> set[str]:
    return {case for case, r in results.items() if r["verdict"] not in ("PASS", "UNSUPPORTED")}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run("smoke", tmp_path_factory.mktemp("smoke"))


def test_the_smoke_level_passes(smoke: Results) -> None:
    assert failed(smoke) == NAN_KEYS, {case: smoke[case]["detail"] for case in failed(smoke) - NAN_KEYS}
    assert {r["evidence"] for r in smoke.values()} == {"emulated"}


def test_every_other_op_was_judged_by_its_own_kernel(smoke: Results) -> None:
    ops = {case.partition("[")[0] for case in smoke} - {"metamorphic"}
    passed = {case.partition("[")[0] for case, r in smoke.items() if r["verdict"] == "PASS"}
    assert ops - passed == NOTHING | WIDTHS
    own = {case.partition("[")[0] for case, r in smoke.items() if r["kernel"] == "ascend-emulated:aclnn"}
    assert passed - own - {"metamorphic"} == {"indexer_prolog", "mla_prolog"}  # by their parts, at these widths


def test_what_is_refused_is_refused_by_a_limit(smoke: Results) -> None:
    refused = {case: r for case, r in smoke.items() if r["verdict"] == "UNSUPPORTED"}
    assert {r["code"] for r in refused.values()} <= REFUSALS
    assert all(r["detail"] for r in refused.values())


@pytest.mark.slow
def test_the_standard_level_passes(tmp_path: Path) -> None:
    results = run("standard", tmp_path)
    assert failed(results) == NAN_KEYS
    passed = {case for case, r in results.items() if (r["verdict"], r["kernel"]) == ("PASS", "ascend-emulated:aclnn")}
    glm5 = {case.partition("[")[0] for case in passed if "-glm5" in case}
    wanted = {"sparse_mla", "mla_decode", "mla_prolog", "lightning_indexer", "moe_experts", "moe_route", "grouped_gemm"}
    assert wanted <= glm5
