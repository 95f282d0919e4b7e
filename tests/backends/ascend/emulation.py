"""The adapters over emulated ops: judged by the suite at points that the vendor's ops take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toys import installed, stand_in

from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import Case
from glm5_hal.conformance.checks import CHECKS
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.results import Result
from glm5_hal.conformance.subject import Subject, prepared
from glm5_hal.conformance.target import targets
from glm5_hal.ops import specs
from glm5_hal.spec import Sample

ROOT = Path(__file__).resolve().parents[3]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from ci.ascend import emulated, emulator  # noqa: E402, F401 - for tests, from here

#: Few checks, where many points are looked at.
QUICK = ("form", "accuracy", "poison", "integrity")

#: What the vendor's ops take, small. Requests one after the other: several tokens of one, none, no keys, more tokens
#: than keys.
RAGGED = ((1, 70), (2, 40), (0, 9), (2, 0), (3, 2), (1, 1))
SPARSE = {"H": 4, "L": 512, "R": 64, "K": 72, "scale": 0.0625, "page": 16, "format": "latent_512_rope_64"}
DENSE = {"H": 4, "L": 512, "R": 64, "scale": 0.0625, "page": 16, "format": "latent_512_rope_64"}
HEADS = {"H": 2, "Dqk": 192, "Dv": 128, "scale": 0.0722}
INDEXER = {"H": 4, "D": 128, "K": 24, "page": 16, "format": "bf16_128"}
PROLOG = {"T": 5, "E": 1024, "Q": 1536, "H": 2, "K": 128, "L": 512, "R": 64, "N": 2, "page": 16, "eps": 1e-5}
PROLOG = {**PROLOG, "format": "latent_512_rope_64"}


def judged(
    op: str,
    axes: dict[str, Any],
    *,
    checks: Sequence[str] = (),
    dtype: str = "bfloat16",
    once: bool = False,
    **sample: Any,
) -> Result:
    """What the suite says of an adapter at one point: by all of its checks, or by these; ``once``: without a call of
    other lengths before."""
    case = Case(op, dtype, Sample("adapted", axes, dtypes=(dtype,), **sample))
    asked = {name: CHECKS[name] for name in checks or CHECKS}
    subject = prepared(case, 0)
    assert isinstance(subject, Subject), subject
    with installed(stand_in("emulated", emulated.kernels, probe=emulated.probe, builtin=True)):
        (target,) = targets("emulated:aclnn")
        return runner.run_case(replace(subject, other=None) if once else subject, case, target, 0, checks=asked)


def call(op: str, axes: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """A call's arguments."""
    return dict(specs()[op].inputs(Sample("a call", axes), dtype, Draw(0, op)).args)


def adapter(op: str) -> Callable[..., Any]:
    """The adapter of an op, for plain weights."""
    return next(kernel.fn for kernel in emulated.kernels() if kernel.op == op)
