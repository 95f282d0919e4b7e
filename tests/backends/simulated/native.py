"""The adapters of a vendor's libraries, on a stand-in of its device, in a process of its own.

    PYTHONPATH=ci:tests/helpers:tests/backends python native.py VENDOR

The libraries are the stand-ins of tests/backends/VENDOR: they compute on the CPU, in the device's memory, and take
nothing of the host. What is tried is the glue around them: everything that it makes must be on the device.
Prints one JSON object: of each kernel's cases the verdict and what was wrong.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from types import FunctionType
from typing import Any

import pytest
import torch
from simulated.identities import IDENTITIES
from simulated.plugin import stand_in
from toys import installed
from toys import stand_in as record_of

from glm5_hal.conformance import runner
from glm5_hal.conformance.cases import cases
from glm5_hal.conformance.subject import prepared
from glm5_hal.conformance.target import targets

#: Cases of each kernel that it takes; most are refused, by widths and dtypes.
EACH = 1

#: What makes each vendor's libraries, of its tests' standins.
LIBRARIES = {
    "musa": ("mate",),
    "cambricon": ("torch_mlu_ops",),
    "kunlunxin": ("kunlun_ops",),
    "hygon": ("flash_mla",),
    "metax": ("flash_mla",),
}


def main(vendor: str) -> None:
    device = stand_in(IDENTITIES[vendor])
    standins, patch, before = import_module(f"{vendor}.standins"), pytest.MonkeyPatch(), set(sys.modules)
    for library in LIBRARIES[vendor]:
        getattr(standins, library)(patch)
    for name in set(sys.modules) - before:
        for what, value in list(vars(sys.modules[name]).items()):
            if isinstance(value, FunctionType):
                setattr(sys.modules[name], what, device.hosted(value))
    real = import_module(f"glm5_hal.backends.{vendor}").glm5_backend()
    found = replace(real.probe(), evidence="simulated")
    kernels = import_module(f"glm5_hal.backends.{vendor}.libraries").adapted()
    said: dict[str, Any] = {}
    with installed(record_of(vendor, kernels, device_type=real.device_type, probe=lambda: found, builtin=True)):
        for target in targets(vendor):
            for op in sorted({kernel.op for kernel in kernels if kernel.provider == target.provider}):
                said[f"{op} {target.provider}"] = results = {}
                for case in cases("standard", (op,)):
                    if case.bad or case.relation or len(results) == EACH:
                        continue
                    result = runner.run_case(prepared(case, 0), case, target, 0)
                    if result.verdict != "UNSUPPORTED":
                        results[case.id] = (result.verdict, result.detail)
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
