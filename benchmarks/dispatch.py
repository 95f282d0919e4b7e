"""What dispatch adds to a bare kernel: six tensor arguments, against a plain Python call in the same run.

The kernel is a stand-in that does nothing but return a tensor, so that only the path to it is timed. Values are not
checked here (`check="metadata"`): on CPU tensors checking indices is work of its own, listed as its own row.

    python benchmarks/dispatch.py [--json]     exit code 1 where a path adds more than its budget
"""

from __future__ import annotations

import argparse
import json
import sys
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import torch

import glm5_hal
from glm5_hal import context
from glm5_hal.backend import Backend, Device, Kernel
from glm5_hal.catalogue import Catalogue
from glm5_hal.conformance.inputs import Draw
from glm5_hal.ops import specs
from glm5_hal.plugins import PluginRecord

OP = "lightning_indexer"
BUDGET = {"table": 2.0, "bind": 0.1, "torch op": 5.0}


def measure(number: int, repeat: int) -> dict[str, Any]:
    """Microseconds per call, the best of several repeats, and what each path adds to the plain call."""
    spec = specs()[OP]
    sample = next(s for s in spec.samples() if s.id == "decode-bf16_128")
    args = spec.inputs(sample, "float32", Draw(0, OP)).args
    tensors = [args[a.name] for a in spec.args]
    answer = torch.zeros(1, dtype=torch.int32)

    def null(
        q: Any, weights: Any, index_cache: Any, block_table: Any, seq_lens: Any, cu_seqlens_q: Any, *,
        top_k: int, cache_format: str = "bf16_128",
    ) -> Any:  # fmt: skip
        return answer

    with context.installed(Catalogue((_only(Kernel(OP, "native", null)),))):
        op = getattr(glm5_hal.ops, OP)
        bound = op.bind(*tensors, top_k=24)
        torch_op = getattr(torch.ops.glm5, OP).default

        def timed(call: Callable[..., Any]) -> float:
            run = timeit.Timer(lambda: call(*tensors, top_k=24))
            return min(run.repeat(repeat, number)) / number * 1e6

        rows = {}
        with torch.inference_mode(), glm5_hal.use(check="metadata"):
            rows |= {"plain call": timed(null), "bind": timed(bound), "table": timed(op), "torch op": timed(torch_op)}
        with glm5_hal.use(check="metadata"):
            rows["table, grad mode"] = timed(op)
        with torch.inference_mode():
            rows["table, values checked"] = timed(op)
    added = {name: value - rows["plain call"] for name, value in rows.items()}
    within = {name: added[name] <= limit for name, limit in BUDGET.items()}
    return {
        "op": OP,
        "tensor_arguments": len(tensors),
        "us": rows,
        "added_us": added,
        "budget_us": BUDGET,
        "within": within,
    }


def _only(kernel: Kernel) -> PluginRecord:
    backend = Backend("null", "cpu", lambda: Device("cpu", "stand-in", "none", evidence="simulated"), lambda: (kernel,))
    return PluginRecord(
        name="null",
        value="benchmarks.dispatch",
        dist="glm5-hal",
        version="",
        builtin=True,
        status="ok",
        backend=backend,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--calls", type=int, default=50_000, help="calls per repeat")
    parser.add_argument("--repeat", type=int, default=7, help="repeats of which the fastest counts")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(options.calls, options.repeat)
    code = 0 if all(found["within"].values()) else 1
    if options.json:
        print(json.dumps(found, indent=2))
        return code
    print(f"{found['op']}: {found['tensor_arguments']} tensor arguments, one thread")
    for name, value in found["us"].items():
        limit = BUDGET.get(name)
        over = not found["within"].get(name, True)
        note = "" if limit is None else f"  budget +{limit}{', over' if over else ''}"
        print(f"  {name:<24} {value:7.2f} us   {found['added_us'][name]:+6.2f}{note}")
    return code


if __name__ == "__main__":
    sys.exit(main())
