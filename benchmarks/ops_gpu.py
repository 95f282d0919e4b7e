"""Every kernel of a GPU's backend at GLM-5's widths: beside its peers, and against what that card is measured to do.

Calls are decode steps of 1 to 128 requests over contexts of up to 128K keys, and chunks of prompts. Times are the
device's own, medians, with nothing in a cache, launches hidden behind other work as they are in a serving engine; the
first line says how fast the card copied, multiplied and launched in this very run. The limit of a call is the largest
of its flops over the measured matrix rate, its bytes over the measured copy rate (both of the op's ``cost``), and its
launches times the time of an empty one. Rows are shown as they come; ``--out`` keeps them as they come, too.

    python benchmarks/ops_gpu.py [--backend cuda] [--op GLOB] [--provider GLOB] [--loads serving|tuned] [--seconds S]
                                 [--json] [--out F]

Exit code 3 where there is no such device.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _peers import peers

import glm5_hal
from glm5_hal import context, ops
from glm5_hal.backend import Device, Unavailable
from glm5_hal.conformance.timing import seconds_of
from glm5_hal.conformance.workloads import SERVING, TUNED, Widths, Workload, workloads
from glm5_hal.errors import HalError
from glm5_hal.ops import specs
from glm5_hal.ops._common.costs import cost_of

Call = Callable[[], Any]

#: Launches in a row, of which one's share is the time of a launch; bytes of a copy; rows of square matrices.
LAUNCHES, COPIED, MATRIX = 10, 1 << 30, 8192

WIDTHS = Widths()


@dataclass(frozen=True)
class Limits:
    """What the card did in this run."""

    copied: float  # bytes per second, read plus write
    multiplied: Mapping[str, float]  # flops per second by dtype
    launch: float  # seconds of a kernel that does nothing, one of several


@dataclass
class Row:
    """One call. Times in seconds, by provider and by peer; ``refused`` says why others have none."""

    op: str
    shape: str
    cache_format: str
    chosen: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    limit: dict[str, float] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    skipped: str = ""

    @property
    def of_limit(self) -> float:
        """Of the kernel that a call would get."""
        return self.limit[self.chosen] / self.seconds[self.chosen]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--op", default="*", help="only ops that match")
    parser.add_argument("--provider", default="*", help="only providers that match")
    parser.add_argument("--loads", choices=("serving", "tuned"), default="serving", help="tuned: half as many")
    parser.add_argument("--seconds", type=float, default=0.1, help="time budget of one kernel at one call")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="a file that every row is added to, as a line of JSON")
    options = parser.parse_args(argv)
    try:
        device = _device(options.backend)
    except HalError as problem:
        print(f"error {problem}", file=sys.stderr)
        return 3
    providers = _providers(options.backend, options.provider)
    if not providers:
        known = ", ".join(_providers(options.backend, "*"))
        parser.error(f"no provider of {options.backend} matches {options.provider!r}; there are {known}")
    torch.manual_seed(0)
    with torch.inference_mode():
        limits = _limits(device.type, options.seconds)
        about = {"device": asdict(device) | {"features": sorted(device.features)}, "limits": asdict(limits)}
        if not options.json:
            _show_head(device, limits)
        rows = []
        for row in _rows(options, providers, device, limits):
            rows.append({**asdict(row), "of_limit": 0.0 if row.skipped else row.of_limit})
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            if not options.json:
                _show(row)
    if options.json:
        print(json.dumps({**about, "torch": torch.__version__, "rows": rows}, indent=2))
    return 0


def _device(backend: str) -> Device:
    found = context.catalogue().device(backend)
    if isinstance(found, Unavailable):
        raise HalError("UNAVAILABLE", f"backend {backend}: {found.reason}", value=backend, fix=found.fix)
    return found


# --- what the card does ----------------------------------------------------------------------------------------------


def _limits(device: str, seconds: float) -> Limits:
    def measured(call: Call) -> float:
        return seconds_of(call, device, max(seconds, 0.2))

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(MATRIX, MATRIX, dtype=dtype, device=device) for _ in range(2))
        return 2 * MATRIX**3 / measured(lambda: a @ b)

    source, one = torch.zeros(COPIED, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    sink = torch.empty_like(source)
    copied = 2 * COPIED / measured(lambda: sink.copy_(source))
    launch = measured(lambda: [one.add_(1.0) for _ in range(LAUNCHES)]) / LAUNCHES
    return Limits(copied, {name: product(getattr(torch, name)) for name in ("bfloat16", "float32")}, launch)


def _launches(call: Call, device: str) -> int:
    """Kernels, copies and fills that a call puts on the device, 1 where that cannot be seen."""
    activity = getattr(torch.profiler.ProfilerActivity, "CUDA" if device == "cuda" else "PrivateUse1", None)
    if device == "cpu" or activity is None:
        return 1
    try:
        call()
        getattr(torch, device).synchronize()
        with torch.profiler.profile(activities=[activity]) as seen:
            call()
            getattr(torch, device).synchronize()
        return max(sum(e.device_type != torch.autograd.DeviceType.CPU for e in seen.events()), 1)
    except (RuntimeError, AttributeError):
        return 1


# --- rows ------------------------------------------------------------------------------------------------------------


def _providers(backend: str, pattern: str) -> list[str]:
    known = (p for p in context.catalogue().providers(backend) or () if p not in ("reference", "composite"))
    return [p for p in known if fnmatch.fnmatch(p, pattern)]


def _rows(options: Any, providers: Sequence[str], device: Device, limits: Limits) -> Iterator[Row]:
    loads = SERVING if options.loads == "serving" else TUNED
    for call in workloads(loads, WIDTHS):
        if fnmatch.fnmatch(call.op, options.op):
            row = Row(call.op, call.shape, call.cache_format)
            try:
                _measure(row, call, [f"{options.backend}:{p}" for p in providers], device, limits, options.seconds)
            except (torch.OutOfMemoryError, MemoryError):
                row.skipped = "it does not fit the device's memory"
                getattr(torch, device.type).empty_cache()
            yield row


def _measure(row: Row, call: Workload, policies: Sequence[str], device: Device, limits: Limits, seconds: float) -> None:
    args = call.make(device.type)
    cost = cost_of(specs()[call.op], args, call.dtype)
    compute = call.share * cost.flops / limits.multiplied[call.dtype]
    roofline = {"memory": cost.bytes / limits.copied, "compute": compute}
    for policy in policies:
        provider = policy.partition(":")[2]
        with glm5_hal.use(policy, check="metadata"):
            try:
                kernel = partial(getattr(ops, call.op).bind(**args), **args)
                row.seconds[provider] = seconds_of(kernel, device.type, seconds)
            except HalError as refusal:
                row.refused[provider] = str(refusal.trace[0].decision) if refusal.trace else refusal.what
                continue
            except torch.OutOfMemoryError:
                row.refused[provider] = "out of memory"
                continue
            row.launches[provider] = _launches(kernel, device.type)
        bounds = {**roofline, "launch": limits.launch * row.launches[provider]}
        row.bound[provider] = max(bounds, key=lambda what: bounds[what])
        row.limit[provider] = bounds[row.bound[provider]]
    if not row.seconds:
        row.skipped = "; ".join(f"{who}: {why}" for who, why in row.refused.items()) or "nobody has a kernel"
        return
    with glm5_hal.use(policies[0].partition(":")[0], check="metadata"):
        best = getattr(ops, call.op).choose(**args).kernel.provider
    row.chosen = best if best in row.seconds else next(iter(row.seconds))
    for name, peer in peers(call.op, args):
        try:
            if isinstance(peer, str):
                row.refused[name] = peer
            else:
                row.peers[name] = seconds_of(peer, device.type, seconds)
        except Exception as problem:  # noqa: BLE001 - a peer's failure is its own
            row.refused[name] = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"


def _show_head(device: Device, limits: Limits) -> None:
    versions = ", ".join(f"{what} {version}" for what, version in device.versions.items())
    print(f"{device.name} ({device.arch}), {versions}")
    rates = ", ".join(f"{rate / 1e12:.1f} TFLOP/s {name}" for name, rate in limits.multiplied.items())
    print(f"measured now: copy {limits.copied / 1e9:.0f} GB/s, matmul {rates}, launch {limits.launch * 1e6:.1f} us\n")
    print(f"{'op':<18} {'call':<20} {'format':<11} {'kernel':<12} {'us':>10}  {'of limit':>8} {'by':<8} {'others, us'}")


def _show(row: Row) -> None:
    head = f"{row.op:<18} {row.shape:<20} {row.cache_format:<11}"
    if row.skipped:
        print(f"{head} - {row.skipped}", flush=True)
        return
    others = {k: v for k, v in row.seconds.items() if k != row.chosen} | row.peers
    told = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in others.items())
    us, bound = row.seconds[row.chosen] * 1e6, row.bound[row.chosen]
    print(f"{head} {row.chosen:<12} {us:>10.1f}  {row.of_limit:>8.0%} {bound:<8} {told}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
