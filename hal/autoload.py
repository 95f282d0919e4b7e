"""The first import of torch. It reads every installed package's entry points, so any package can spoil it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from glm5_hal.errors import HalError
from glm5_hal.plugins.discovery import NO_FILE, unreadable
from glm5_hal.plugins.isolation import told
from glm5_hal.plugins.record import PluginRecord

#: torch's own switch, and the function behind it.
SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_AUTOLOAD = "_import_device_backends"

_failure: HalError | None = None


def import_torch() -> None:
    """Import torch, or say whose package prevents it, the same each time: torch's second import hides the cause.

    Raises:
        HalError: UNAVAILABLE.
    """
    global _failure
    if _failure is not None:
        raise _failure.with_traceback(None)
    if "torch" not in sys.modules and os.environ.get(SWITCH, "1") == "1":
        endless = [record for record in unreadable() if NO_FILE in record.reason]
        if endless:  # torch would wait for it
            raise _spoilt(endless)
    try:
        import torch  # noqa: F401
    except Exception as problem:
        _failure = blamed(problem)
        if _failure is None:
            raise
        raise _failure from problem


def blamed(problem: BaseException) -> HalError | None:
    """What to say of an error from torch's import of other packages; None for any other error."""
    trace, names = problem.__traceback__, set()
    while trace is not None:
        names.add(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    if _AUTOLOAD not in names:
        return None
    culprits = unreadable()
    if culprits:
        return _spoilt(culprits)
    said = f"{told(problem)[0]}: {told(problem.__cause__ or problem)[0]}"
    return _error(said, f"reinstall or remove the package that offers it{_offers()}")


def _spoilt(culprits: Sequence[PluginRecord]) -> HalError:
    return _error("; ".join(f"{r.origin}: {r.reason}" for r in culprits), " and ".join(r.fix for r in culprits))


def _error(said: str, fix: str) -> HalError:
    what = f"torch cannot be imported, because it loads what other packages announce: {said}"
    return HalError("UNAVAILABLE", what, value=os.environ.get(SWITCH), fix=f"{fix}; or set {SWITCH}=0")


def _offers() -> str:
    """The packages that extend torch at its import."""
    from importlib import metadata

    found = {p.dist.name for p in metadata.entry_points(group="torch.backends") if p.dist is not None}
    return f" ({', '.join(sorted(found))})" if found else ""
