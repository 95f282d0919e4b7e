"""What is installed, as data: ops, backends, cache formats. Only built-in backends are probed, in a process of their
own, and each outside plugin is loaded in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm5_hal import context, plugins
from glm5_hal.formats import FORMATS
from glm5_hal.ops import specs

if TYPE_CHECKING:
    from rich.console import RenderableType


def inventory() -> dict[str, Any]:
    """Everything that `glm5-hal list` shows. A backend's providers are known once its device is there."""
    loaded = plugins.check_up_all(context.catalogue().found, plugins.LOAD_DEADLINE, "load")
    records, offered = plugins.survey([checkup.record for checkup in loaded])
    backends = [
        {
            "name": record.name,
            "status": record.status,
            "reason": record.reason,
            "fix": record.fix,
            "device_type": record.device_type,
            "providers": [p for p in names or () if p != "composite"],
            "dist": record.dist,
            "version": record.version,
            "builtin": record.builtin,
        }
        for record, names in zip(records, offered, strict=True)
    ]
    return {
        "ops": [
            {
                "name": s.name,
                "group": s.group,
                "since": s.since,
                "composite": s.composite,
                "signature": str(s.signature).replace("torch.", ""),
                "summary": s.doc.splitlines()[0],
                "attributes": list(s.attributes),
                "mutates": list(s.mutates),
            }
            for s in specs().values()
        ],
        "backends": backends,
        "cache_formats": [
            {"name": f.name, "kind": f.kind, "tensors": list(f.tensors), "layout": f.layout} for f in FORMATS.values()
        ],
    }


def tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """The inventory for a terminal."""
    from rich.table import Table
    from rich.text import Text

    ops = Table("op", "group", "since", "what it computes", header_style="bold")
    for op in found["ops"]:
        ops.add_row(op["name"], op["group"], str(op["since"]), op["summary"])
    backends = Table("backend", "status", "device", "providers", "from", header_style="bold")
    for b in found["backends"]:
        backends.add_row(
            b["name"], b["status"], b["device_type"], ", ".join(b["providers"]), f"{b['dist']} {b['version']}"
        )
    formats = Table("cache format", "kind", "layout", header_style="bold")
    for f in found["cache_formats"]:
        formats.add_row(f["name"], f["kind"], f["layout"])
    wrong = [Text(f"{b['name']}: {b['reason']}\n  fix: {b['fix']}") for b in found["backends"] if b["reason"]]
    return [ops, backends, *wrong, formats]
