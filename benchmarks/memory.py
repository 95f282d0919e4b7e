"""How far one call pushes a process's memory up: GLM-5's widths, bfloat16, 64K cached keys, provider torch on the CPU.

Each row is a process of its own. It draws the inputs, makes a small call so that libraries and their threads have
started, returns freed memory to the system, and then makes the one call that is measured. Growth is the peak of
resident memory during that call less what was resident before it. The limit is the size of inputs and outputs.

    python benchmarks/memory.py [--json] [--op GLOB]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from _measure import grown

KEYS = 65536


@dataclass(frozen=True)
class Point:
    """One op at one shape: ``tokens`` new ones of one request with ``keys`` cached keys."""

    op: str
    tokens: int
    format: str
    keys: int = KEYS

    @property
    def id(self) -> str:
        return f"{self.op} T{self.tokens} S{self.keys} {self.format}"


POINTS = tuple(
    Point(op, tokens, form)
    for op, forms in (
        ("mla_decode", ("latent_576", "fp8_656")),
        ("sparse_mla", ("latent_576", "fp8_656")),
        ("indexer_logits", ("bf16_128",)),
        ("lightning_indexer", ("bf16_128", "fp8_132")),
    )
    for form in forms
    for tokens in (1, 4)
)


def arguments(point: Point) -> dict[str, Any]:
    from glm5_hal.conformance.inputs import Draw
    from glm5_hal.ops import _lightning_indexer, _sparse_mla, specs
    from glm5_hal.spec import Sample

    latent = point.op in ("mla_decode", "sparse_mla")
    widths = _sparse_mla.GLM5 if latent else {**_lightning_indexer.logits_op.GLM5, "K": 2048}
    axes = {**widths, "page": 64, "format": point.format, "lens": ((point.tokens, point.keys),)}
    return dict(specs()[point.op].inputs(Sample(point.id, axes), "bfloat16", Draw(0, point.id)).args)


def measure(point: Point) -> dict[str, Any]:
    """In this process: growth, in bytes, over one call."""
    import torch

    import glm5_hal
    from glm5_hal import ops

    op = getattr(ops, point.op)
    with torch.inference_mode(), glm5_hal.use("cpu:torch"):
        op(**arguments(Point(point.op, 1, point.format, keys=64)))
        args = arguments(point)
        growth, made, method = grown(lambda: op(**args))
    size = _bytes(args) + _bytes(dict(enumerate(made if isinstance(made, tuple) else (made,))))
    return {
        "op": point.op,
        "tokens": point.tokens,
        "keys": point.keys,
        "format": point.format,
        "shapes": {n: [str(a.dtype)[6:], *a.shape] for n, a in args.items() if isinstance(a, torch.Tensor)},
        "growth_bytes": growth,
        "limit_bytes": size,
        "ratio": growth / size,
        "method": method,
        "threads": torch.get_num_threads(),
    }


def _bytes(tensors: Mapping[Any, Any]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors.values() if hasattr(t, "itemsize"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--op", default="*", help="only ops that match")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child is not None:
        print(json.dumps(measure(Point(**options.child))))
        return 0
    rows = []
    for point in POINTS:
        if fnmatch.fnmatch(point.op, options.op):
            child = [sys.executable, __file__, "--child", json.dumps(asdict(point))]
            rows.append(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
            if not options.json:
                _show(rows[-1], first=len(rows) == 1)
    within = all(row["ratio"] <= 1 for row in rows)
    if options.json:
        print(json.dumps({"within": within, "rows": rows}, indent=2))
    return 0 if within else 1


def _show(row: Mapping[str, Any], first: bool) -> None:
    if first:
        print(f"{'op':<18} {'T':>2} {'S':>6} {'format':<12} {'growth':>9} {'limit':>9}  ratio")
    growth, limit = (f"{row[k] / 2**20:.1f} MiB" for k in ("growth_bytes", "limit_bytes"))
    print(
        f"{row['op']:<18} {row['tokens']:>2} {row['keys']:>6} {row['format']:<12} {growth:>9} {limit:>9}  "
        f"{row['ratio']:.2f}{'' if row['ratio'] <= 1 else '  over'}"
    )


if __name__ == "__main__":
    sys.exit(main())
