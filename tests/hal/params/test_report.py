"""The report carries the counts unchanged, as JSON and as a terminal shows it."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from glm5_hal.params import load, render, report
from glm5_hal.params.count import cost_sheet, parameters

MODELS = ("glm-5", "glm-5.2", "deepseek-v3.2")


def shown(data, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(data))
    return console.file.getvalue()


@pytest.mark.parametrize("model", MODELS)
def test_the_report_is_plain_json(model):
    data = report(load(model), 4096)
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize("model", MODELS)
def test_the_report_carries_the_counts(model):
    config = load(model)
    data = report(config, 4096)
    assert (data["name"], data["config_source"], data["context"]) == (model, f"built-in {model}.json", 4096)
    assert data["parameters"]["total_checkpoint"] == parameters(config).total_checkpoint
    assert data["parameters"]["by_component"] == parameters(config).by_component
    flops = data["flops_per_token"]
    assert flops["by_component"] == {line.name: line.total_flops for line in cost_sheet(config, 4096)}
    assert flops["total"] == sum(flops["by_component"].values())
    assert "2 FLOPs per multiply-add" in flops["convention"]
    assert data["kv_cache_bytes_per_token"]["fp8_656"]["needed"] == 656 * config.num_hidden_layers


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_show_every_number_in_full(width):
    data = report(load("glm-5.2"), 131072)
    text = shown(data, width)
    counts = [v for v in data["parameters"].values() if isinstance(v, int)]
    counts += [v for key in ("by_component", "mtp_by_component") for v in data["parameters"][key].values()]
    counts += [row["needed"] for row in data["kv_cache_bytes_per_token"].values()]
    assert [n for n in counts if f" {n:,} " not in text] == []
    assert [name for name in data["kv_cache_bytes_per_token"] if name not in text] == []
    assert f"{data['flops_per_token']['total'] / 1e6:,.1f}" in text
    assert "131,072 keys" in text
    assert "…" not in text


def test_a_model_without_a_fitting_cache_format_renders():
    data = report(load("glm-5"), 1)
    assert "Cache bytes" in shown(data, 100)
    assert "Cache bytes" not in shown({**data, "kv_cache_bytes_per_token": {}}, 100)


def test_counting_loads_neither_torch_nor_rich():
    code = (
        "import sys; from glm5_hal.params import load, report; report(load('glm-5'), 1);"
        "sys.exit(bool({'torch', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
