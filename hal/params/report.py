"""The counts of :mod:`glm5_hal.params.count` as one JSON-ready dict, and that dict as tables for a terminal."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from glm5_hal.params.config import ModelConfig
from glm5_hal.params.count import FLOPS_CONVENTION, cost_sheet, kv_cache_bytes, parameters

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


def report(config: ModelConfig, context: int) -> dict[str, Any]:
    """Parameters, FLOPs per token and cache bytes per token. Only dicts, text, integers: ready for ``json.dumps``."""
    costs = cost_sheet(config, context)
    return {
        "name": config.name,
        "config_source": config.source,
        "model_type": config.model_type,
        "context": context,
        "parameters": asdict(parameters(config)),
        "flops_per_token": {
            "convention": FLOPS_CONVENTION,
            "total": sum(cost.total_flops for cost in costs),
            "by_component": {cost.name: cost.total_flops for cost in costs},
        },
        "kv_cache_bytes_per_token": {name: asdict(found) for name, found in kv_cache_bytes(config).items()},
    }


def render(report: dict[str, Any]) -> RenderableType:
    """The report as rich tables; print it with a ``rich.console.Console``."""
    from rich.console import Group
    from rich.text import Text

    parameters, flops = report["parameters"], report["flops_per_token"]
    tables = [_totals(parameters), _components(parameters), _flops(flops, report["context"])]
    if report["kv_cache_bytes_per_token"]:
        tables.append(_cache(report["kv_cache_bytes_per_token"]))
    title = Text(f"{report['name']} ({report['model_type']}), {report['config_source']}", style="bold")
    return Group(title, *tables, Text(f"FLOPs: {flops['convention']}.", style="dim"))


def _table(title: str, first: str, *numbers: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _totals(parameters: dict[str, Any]) -> Table:
    table = _table("Parameters", "count of", "parameters", "billion")
    for key, value in parameters.items():
        if isinstance(value, int):
            table.add_row(key.replace("_", " "), f"{value:,}", f"{value / 1e9:.2f}")
    return table


def _components(parameters: dict[str, Any]) -> Table:
    parts = [parameters[key] for key in ("by_component", "active_by_component", "mtp_by_component")]
    table = _table("Parameters by component", "component", "main", "active per token", "MTP layer")
    for name in dict.fromkeys(name for part in parts for name in part):
        table.add_row(name.replace("_", " "), *(f"{part[name]:,}" if name in part else "" for part in parts))
    return table


def _flops(flops: dict[str, Any], context: int) -> Table:
    table = _table(f"FLOPs per token, {context:,} keys", "component", "MFLOP", "share")
    for name, value in flops["by_component"].items():
        table.add_row(name, f"{value / 1e6:,.1f}", f"{value / flops['total']:.1%}")
    table.add_section()
    table.add_row("total", f"{flops['total'] / 1e6:,.1f}", "")
    return table


def _cache(formats: dict[str, Any]) -> Table:
    columns = ("per_layer", "needed", "needed_with_mtp", "all_layers", "all_layers_with_mtp")
    table = _table("Cache bytes per token", "format", "layer", "needed", "+ MTP", "all layers", "+ MTP")
    for name, found in formats.items():
        table.add_row(f"{name} ({found['kind']})", *(f"{found[column]:,}" for column in columns))
    return table
