"""What dispatch adds to a bare kernel: six tensor arguments, against a plain Python call in the same run.

The kernel is a stand-in that does nothing but return a tensor, so that only the path to it is timed. Values are not
checked here (`check="metadata"`): on CPU tensors checking indices is work of its own, listed as its own row.

    python benchmarks/dispatch.py [--json]
"""

from __future__ import annotations

import argparse
import json
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


def measure(number: int = 50_000, repeat: int = 7) -> dict[str, Any]:
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

    _install(Kernel(OP, "native", null))
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


def _install(kernel: Kernel) -> None:
    backend = Backend("null", "cpu", lambda: Device("cpu", "stand-in", "none", evidence="simulated"), lambda: (kernel,))
    record = PluginRecord(
        name="null",
        value="benchmarks.dispatch",
        dist="glm5-hal",
        version="",
        builtin=True,
        status="ok",
        backend=backend,
    )
    context._process.catalogue = Catalogue((record,))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure()
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['op']}: {found['tensor_arguments']} tensor arguments, one thread")
    for name, value in found["us"].items():
        limit = BUDGET.get(name)
        note = f"  budget +{limit}" if limit is not None else ""
        print(f"  {name:<24} {value:7.2f} us   {found['added_us'][name]:+6.2f}{note}")


if __name__ == "__main__":
    main()
