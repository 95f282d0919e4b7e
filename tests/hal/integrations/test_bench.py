"""bench --model: a model's layers at the widths of its configuration, with the kernel that serves each op."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from glm5_hal.cli import app
from glm5_hal.errors import HalError
from glm5_hal.integrations.transformers.bench import measure
from glm5_hal.params.config import BUILT_IN

CONFIGS = Path(__file__).parents[3] / "hal/params/configs"
NARROW = {
    "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 2, "q_lora_rank": 64, "kv_lora_rank": 128, "index_n_heads": 4, "index_topk": 16,
}  # fmt: skip


@pytest.fixture(params=sorted(set(BUILT_IN.values())))
def narrow(request: Any, tmp_path: Path) -> Path:
    """A built-in configuration, narrower."""
    values = json.loads((CONFIGS / request.param).read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, **NARROW}))
    return path


def test_every_op_of_a_decoding_step_is_there_with_its_kernel(narrow: Path) -> None:
    found = measure(str(narrow), context=40, passes=2)
    calls = {row.op: row.calls / found.passes for row in found.ops}
    assert calls["sparse_mla"] == calls["lightning_indexer"] == calls["mla_prolog"] == 2, "both layers"
    assert calls["moe_experts"] == calls["moe_route"] == 1, "one of them is sparse"
    assert {row.kernel.split(":")[0] for row in found.ops} == {"cpu"}
    assert found.seconds > 0
    assert all(row.seconds > 0 for row in found.ops)


def test_a_short_context_attends_to_all_keys(narrow: Path) -> None:
    ops = {row.op for row in measure(str(narrow), context=4, batch=2, passes=1).ops}
    assert "mla_decode" in ops
    assert "sparse_mla" not in ops


def test_the_backend_is_the_one_that_is_named(narrow: Path) -> None:
    found = measure(str(narrow), backend="cpu; rms_norm=cpu:reference", context=4, passes=1)
    assert {row.kernel for row in found.ops if row.op == "rms_norm"} == {"cpu:reference"}


@pytest.mark.parametrize(("how", "words"), [({"experts": 3}, "3 experts"), ({"passes": 0}, "passes=0")])
def test_counts_that_do_not_fit_are_refused(narrow: Path, how: dict[str, int], words: str) -> None:
    with pytest.raises(HalError) as caught:
        measure(str(narrow), **{"context": 4, "passes": 1, **how})
    assert caught.value.code == "CONFIG"
    assert words in caught.value.what


def test_the_command_prints_a_table_or_json(narrow: Path) -> None:
    options = ["bench", "--model", str(narrow), "--context", "4"]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert "one pass:" in shown.output
    found = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert {row["op"] for row in found["ops"]} >= {"mla_decode", "moe_experts"}
    assert CliRunner().invoke(app, ["bench", "--model", "glm-6"]).exception.code == "CONFIG"
