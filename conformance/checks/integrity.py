"""Arguments that the op does not declare as written are the same bits afterwards, and so is the memory around all; and
nothing writes to them meanwhile, which another thread or stream that reads them would see.

Writes in between are seen where they pass torch's dispatcher; what native code writes and puts back is out of reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glm5_hal.conformance.intercept import operations
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
    return Finding(False, problem) if problem else _meanwhile(trial) if trial.case.elected else Finding(True)


def stray_writes(placed: Mapping[str, Any]) -> str:
    """What was written beside the arguments, in words."""
    counts = {name: stray(value) for name, value in placed.items() if isinstance(value, torch.Tensor)}
    return ", ".join(f"wrote {n} bytes beside {name}, in the memory around it" for name, n in counts.items() if n)


def _meanwhile(trial: Trial) -> Finding:
    placed = trial.place(trial.inputs.args)
    read = {k: v for k, v in placed.items() if k not in trial.spec.mutates and isinstance(v, torch.Tensor)}
    writes = Writes(read)
    with operations(writes):
        trial.call(**placed)
    names = ", ".join(dict.fromkeys(writes.found))
    return Finding(not names, f"wrote to its input {names} and put it back" if names else "")


class Writes:
    """Notes operations that write to the memory of these tensors."""

    def __init__(self, watched: Mapping[str, torch.Tensor]) -> None:
        self._owner = {t.untyped_storage().data_ptr(): name for name, t in watched.items() if t.numel()}
        self.found: list[str] = []

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        declared = func._schema.arguments
        written = [a.name for a in declared if a.alias_info is not None and a.alias_info.is_write]
        if written:
            given = {**dict(zip((a.name for a in declared), args, strict=False)), **kwargs}
            for value in map(given.get, written):
                each = value if isinstance(value, (list, tuple)) else [value]
                places = [t.untyped_storage().data_ptr() for t in each if isinstance(t, torch.Tensor)]
                self.found += [self._owner[place] for place in places if place in self._owner]
        return func(*args, **kwargs)
