"""Arguments that the op does not declare as mutated are the same bits afterwards."""

from __future__ import annotations

import torch

from glm5_hal.conformance.trial import Finding, Trial, same_bits


def check(trial: Trial) -> Finding:
    placed = trial.place(trial.inputs.args)
    before = {k: v.clone() for k, v in placed.items() if isinstance(v, torch.Tensor) and k not in trial.spec.mutates}
    trial.call(**placed)
    changed = [name for name, old in before.items() if not same_bits(old.cpu(), placed[name].cpu())]
    return Finding(not changed, f"changed its input {', '.join(changed)}" if changed else "")
