"""Guards around what a kernel allocates, and garbage in what it gets empty: it stays inside, and reads nothing that it
has not written.

Allocations are seen where they pass torch's dispatcher: torch.empty and its like, called from Python or from C++. What
a kernel takes from elsewhere (a C library's own malloc, an op that allocates inside itself) is out of reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glm5_hal.conformance.checks.agreement import as_good
from glm5_hal.conformance.intercept import operations
from glm5_hal.conformance.trial import Finding, Trial, guarded, stray

#: Allocations that come without contents, and those that come with some.
EMPTY = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})
FILLED = frozenset(
    {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "clone"}
)


def check(trial: Trial) -> Finding:
    placed, seen = trial.place(trial.inputs.args), Allocations(trial.device)
    with operations(seen):
        returned = trial.call(**placed)
    written = [(stray(t), t) for t in seen.made]
    beyond = next(((n, t) for n, t in written if n), None)
    if beyond:
        n, t = beyond
        return Finding(False, f"wrote {n} bytes beside a {t.dtype} {list(t.shape)} that it had allocated")
    return as_good(trial, trial.bring_back(returned, placed), "with garbage in the memory that it allocates")


class Allocations:
    """Puts guards around every tensor that is allocated, and garbage into those that are to be empty."""

    def __init__(self, device: str) -> None:
        self._type = device.split(":")[0]
        self.made: list[torch.Tensor] = []

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if (name not in EMPTY and name not in FILLED) or out.device.type != self._type or out.layout != torch.strided:
            return out
        made = guarded(out, str(out.device))
        if name in EMPTY:
            _spoil(made)
        self.made.append(made)
        return made


def _spoil(t: torch.Tensor) -> None:
    """NaN, or numbers that are no index and no answer. A device may not survive a bad index: it gets zeros."""
    if t.dtype == torch.bool or not (t.is_cpu or t.is_floating_point() or t.dtype == torch.uint8):
        t.zero_()
    elif t.is_floating_point() or t.is_complex():
        t.fill_(float("nan"))
    else:
        t.fill_(0x4D if t.itemsize == 1 else 0x7F7F)
