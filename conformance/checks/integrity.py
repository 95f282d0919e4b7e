"""Arguments that the op does not declare as written are the same bits afterwards, and so is the memory around all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glm5_hal.conformance.trial import Finding, Trial, same_bits, stray


def check(trial: Trial) -> Finding:
    placed, _ = trial.raw
    changed = [
        name
        for name, given in trial.inputs.args.items()
        if isinstance(given, torch.Tensor)
        and name not in trial.spec.mutates
        and not same_bits(given, placed[name].cpu())
    ]
    problem = f"changed its input {', '.join(changed)}" if changed else stray_writes(placed)
    return Finding(not problem, problem)


def stray_writes(placed: Mapping[str, Any]) -> str:
    """What was written beside the arguments, in words."""
    counts = {name: stray(value) for name, value in placed.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"wrote {n} bytes beside {name}, in the memory around it" for name, n in counts.items() if n)
