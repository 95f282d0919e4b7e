"""What each op's plain-torch kernel reads from the device, with the lines that do: on hardware each of them is a sync.

    python ci/simulated/reads.py [--plan] [musa]

With ``--plan``, lengths come from the step's plan, as a server gives it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))

from simulated.identities import IDENTITIES
from simulated.plugin import stand_in
from simulated.watching import Read, watched


def reads(device: str, planned: bool) -> Iterator[tuple[str, list[Read]]]:
    """Of every op that has a kernel of its own, in its first case, in bfloat16 where there is one."""
    from glm5_hal.backends import _torch
    from glm5_hal.conformance.cases import cases
    from glm5_hal.conformance.subject import prepared

    judged = [c for c in cases("smoke") if not c.bad and not c.relation]
    for kernel in _torch.kernels():
        mine = [c for c in judged if c.op == kernel.op]
        inputs = prepared(next((c for c in mine if c.dtype == "bfloat16"), mine[0]), 0).inputs
        placed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.args.items()}
        with torch.inference_mode(), _plan(placed) if planned else nullcontext(), watched() as seen:
            kernel.fn(**placed)
        yield kernel.op, list(seen)


def _plan(placed: dict[str, Any]) -> Any:
    from glm5_hal import StepPlan

    lengths = [placed.get(name) for name in ("seq_lens", "cu_seqlens_q")]
    return nullcontext() if None in lengths else StepPlan.build(*lengths).active()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="with a step's plan")
    parser.add_argument("identity", nargs="?", default="musa", choices=IDENTITIES)
    asked = parser.parse_args()
    stand_in(IDENTITIES[asked.identity])
    for op, seen in reads(IDENTITIES[asked.identity].type, asked.plan):
        print(op)
        for read, times in Counter(seen).items():
            print(f"    {times}x {read}")


if __name__ == "__main__":
    main()
