"""What must not be read is filled with NaN (0xFF for bytes, nonsense for indices): the result must not change."""

from __future__ import annotations

import torch

from glm5_hal.conformance.checks.agreement import as_good
from glm5_hal.conformance.trial import Finding, Trial

#: Two different fillings, so that neither can be the right answer by chance.
FILLINGS = {"NaN/0xFF": (float("nan"), 0xFF, 2**31 - 1), "inf/0x7F": (float("inf"), 0x7F, -(2**31))}


def check(trial: Trial) -> Finding:
    masks = {name: mask for name, mask in trial.inputs.poison.items() if bool(mask.any())}
    if not masks:
        return Finding(None, "every element of the inputs counts")
    for label, filling in FILLINGS.items():
        poisoned = {k: _poisoned(v, masks.get(k), filling) for k, v in trial.inputs.args.items()}
        run = trial.run(poisoned)
        what = f"with {label} in what must not be read ({', '.join(masks)})"
        finding = as_good(trial, run, what, bits=not trial.spec.mutates)
        if not finding.ok:
            return finding
    return Finding(True)


def _poisoned(value: object, mask: torch.Tensor | None, filling: tuple[float, int, int]) -> object:
    if mask is None or not isinstance(value, torch.Tensor):
        return value
    number, byte, integer = filling
    fill = number if value.is_floating_point() else byte if value.dtype == torch.uint8 else integer
    return value.clone().masked_fill_(mask, fill)
