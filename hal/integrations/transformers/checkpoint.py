"""The draft layer's weights, from the safetensors of a local checkpoint folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from glm5_hal.integrations.transformers import models
from glm5_hal.integrations.transformers.checks import listing, refuse
from glm5_hal.integrations.transformers.mtp import Mtp

#: Copies of what the model has, and tables that follow from the configuration.
SHARED = ("embed_tokens.weight", "shared_head.head.weight", "self_attn.rotary_emb.inv_freq")

#: What checkpoints store expert by expert and the model holds in one tensor.
EXPERT = re.compile(r"layer\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def load_mtp(model: Any, folder: str | os.PathLike[str]) -> Mtp:
    """The draft layer of a checkpoint: its tensors ``model.layers.N.*``, where N is the model's number of layers.

    Args:
        model: the causal model, loaded from the same folder, that `apply` was called on.
        folder: with ``*.safetensors`` and, where there are several, ``model.safetensors.index.json``.

    Raises:
        HalError: CONFIG where the folder has no such tensors, or others than the model's configuration asks for; TYPE
            for quantised ones; and what `Mtp` raises.
    """
    prefix = f"model.layers.{models.decoder_of(model).config.num_hidden_layers}."
    weights = {_name(name.removeprefix(prefix)): tensor for name, tensor in _tensors(Path(folder), prefix)}
    if not weights:
        refuse(
            "CONFIG",
            f"{folder} has no tensors {prefix}*: its checkpoint has no draft layer",
            value=str(folder),
            fix="name the folder of the published checkpoint; what transformers saves leaves the draft layer out",
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or tensor.element_size() == 1 or name.endswith("_scale_inv"):
            refuse(
                "TYPE",
                f"{prefix}{name} is quantised ({tensor.dtype})",
                value=tensor.dtype,
                fix="dequantise the checkpoint; the operators take plain floating-point weights here",
            )
    return Mtp(model, _joined(weights))


def _tensors(folder: Path, prefix: str) -> Iterator[tuple[str, Tensor]]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / file for name, file in places.items() if name.startswith(prefix)})
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118 - it is no mapping
                if name.startswith(prefix) and name.removeprefix(prefix) not in SHARED:
                    yield name, held.get_tensor(name)


def _name(name: str) -> str:
    """A checkpoint's name as `Mtp` has it."""
    if name.startswith("shared_head.norm."):
        return name.removeprefix("shared_head.")
    return name if name.split(".")[0] in ("enorm", "hnorm", "eh_proj") else f"layer.{name}"


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts in one tensor: gate's rows, then up's. What is already joined stays."""
    found = {name: m.groups() for name in weights if (m := EXPERT.fullmatch(name))}
    if not found:
        return weights
    parts = {(part, int(expert)): weights[name] for name, (expert, part) in found.items()}
    experts = range(1 + max(expert for _, expert in parts))
    absent = [f"experts.{e}.{part}_proj" for e in experts for part in ("gate", "up", "down") if (part, e) not in parts]
    if absent:
        refuse("CONFIG", f"the draft layer has no {listing(absent)}", value=absent, fix="get the missing files")
    joined = {
        "gate_up_proj": torch.stack([torch.cat([parts["gate", e], parts["up", e]]) for e in experts]),
        "down_proj": torch.stack([parts["down", e] for e in experts]),
    }
    others = {name: tensor for name, tensor in weights.items() if name not in found}
    return others | {f"layer.mlp.experts.{name}": tensor for name, tensor in joined.items()}
