"""What each op's plain-torch kernel reads from the device, with the lines that do: on hardware each of them is a sync.

python ci/simulated/reads.py [musa]
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from simulated.plugin import stand_in
from simulated.watching import Read, watched


def reads(device: str) -> dict[str, list[Read]]:
    """Of every op that has a kernel of its own, in its first case in bfloat16."""
    from glm5_hal import ops
    from glm5_hal.backends import _torch
    from glm5_hal.conformance.cases import cases
    from glm5_hal.conformance.subject import prepared

    found: dict[str, list[Read]] = {}
    kernels = {kernel.op: kernel for kernel in _torch.kernels()}
    for case in cases("smoke"):
        if case.op in found or case.op not in kernels or case.dtype != "bfloat16" or case.bad or case.relation:
            continue
        inputs = prepared(case, 0).inputs
        placed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.args.items()}
        with torch.inference_mode(), watched() as seen:
            kernels[case.op].fn(**placed)
        found[case.op] = list(seen)
    assert ops.specs().keys() >= found.keys()
    return found


def main() -> None:
    key = sys.argv[1] if len(sys.argv) > 1 else "musa"
    from simulated.identities import IDENTITIES

    stand_in(key)
    for op, seen in reads(IDENTITIES[key].type).items():
        print(op, "-" if not seen else "")
        for read, times in Counter(seen).items():
            print(f"    {times}x {read}")


if __name__ == "__main__":
    main()
