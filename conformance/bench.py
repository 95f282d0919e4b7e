"""Time kernels on the suite's shapes, as a fraction of what this machine was just measured to do.

The limit of a call is the slower of its floating-point work at the measured matmul rate of the dtype and its memory
traffic at the measured copy bandwidth; both come from the op's declared cost. Above 100 % the data sat in a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from glm5_hal import context, ops
from glm5_hal.conformance.cases import Case, cases
from glm5_hal.conformance.inputs import Draw
from glm5_hal.conformance.target import Target, targets
from glm5_hal.conformance.trial import waiting
from glm5_hal.errors import HalError
from glm5_hal.ops._common.costs import cost_of

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Limits:
    """What the device was measured to do: copy bytes per second (read plus write), matmul operations per second."""

    device: str
    bytes_per_second: float
    flops_per_second: float
    dtype: str


@dataclass(frozen=True)
class Row:
    """One kernel at one shape. ``of_limit`` is limit time over measured time."""

    case: str
    kernel: str
    seconds: float
    runs: int
    limit_seconds: float
    of_limit: float
    bound: str
    skipped: str = ""


@dataclass(frozen=True)
class Bench:
    limits: Limits
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    backend: str, only: Sequence[str], level: str, dtype: str, seconds: float, *, progress: bool = False
) -> Bench:
    """Time every case of a level in one dtype. Raises HalError as `conformance run` does."""
    judged = [t for t in targets(backend) if t.provider != "reference" or ":" in backend]
    chosen = [c for c in cases(level, only) if c.bad is None and c.dtype == dtype and c.sample.level == level]
    if not chosen:
        raise HalError(
            "CONFIG", f"no {level} case in {dtype} matches", value=(level, dtype), fix="see `glm5-hal conformance list`"
        )
    limits = measured_limits(judged[0].device, dtype)
    from glm5_hal.conformance.report import progress as bar

    rows = []
    with bar(len(chosen) * len(judged), progress) as shown:
        for case in chosen:
            for target in judged:
                rows.append(_timed(case, target, limits, seconds))
                if shown:
                    shown[0].update(shown[1], advance=1, description=case.id)
    return Bench(limits, tuple(rows))


def measured_limits(device: str, dtype: str) -> Limits:
    """This device's own copy bandwidth and matmul rate, best of a few runs."""
    return Limits(device, copy_rate(device, 0.5), matmul_rate(device, dtype, 0.3), dtype)


def copy_rate(device: str, seconds: float) -> float:
    """Bytes per second, read plus write, of a copy too large for caches."""
    source = torch.zeros(1 << 26, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: sink.copy_(source), device, seconds)


def matmul_rate(device: str, dtype: str, seconds: float) -> float:
    """Floating-point operations per second of a matrix product of such numbers."""
    largest = 1024 if device.split(":")[0] == "cpu" else 4096
    kind = getattr(torch, dtype)
    # Some dtypes have no fast product on some devices: what counts is the best way to multiply such numbers there.
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda m: m @ m]
    if kind is not torch.float64:
        ways.append(lambda m: m.float() @ m.float())
    best = 0.0
    for way in ways:
        size, taken = largest // 8, 0.0
        while size <= largest and 8 * taken < max(seconds, 0.5):  # a way that is slow would take minutes at full size
            matrix = torch.ones(size, size, dtype=kind, device=device)
            taken = _best(partial(way, matrix), device, seconds / 4, at_most=20)
            best, size = max(best, 2 * size**3 / taken), 2 * size
    return best


def _timed(case: Case, target: Target, limits: Limits, seconds: float) -> Row:
    op = getattr(ops, case.op)
    args = case.spec.inputs(case.sample, case.dtype, Draw(0, case.id)).args
    placed = {k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with torch.inference_mode(), context.use(target.policy, check="metadata"):
        try:
            name = op.choose(**placed).name
            runs, best = _repeat(lambda: op(**placed), target.device, seconds)
        except HalError as refusal:
            return Row(case.id, target.policy, 0.0, 0, 0.0, 0.0, "", skipped=refusal.what)
    cost = cost_of(case.spec, args, case.dtype)
    compute, memory = cost.flops / limits.flops_per_second, cost.bytes / limits.bytes_per_second
    limit = max(compute, memory)
    return Row(case.id, name, best, runs, limit, limit / best, "compute" if compute > memory else "memory")


def _best(call: Callable[[], Any], device: str, seconds: float, at_most: int = 1000) -> float:
    return _repeat(call, device, seconds, at_most)[1]


def _repeat(call: Callable[[], Any], device: str, seconds: float, at_most: int = 1000) -> tuple[int, float]:
    """Runs within a time budget, after one to warm up; the fastest counts."""
    wait = waiting(device)
    call()
    wait()
    runs, best, end = 0, float("inf"), time.perf_counter() + seconds
    while runs < 1 or (time.perf_counter() < end and runs < at_most):
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return runs, best


def render(found: Bench) -> RenderableType:
    """The rows for a terminal."""
    from rich.console import Group
    from rich.table import Table

    table = Table("case", "kernel", header_style="bold")
    for column in ("time", "of limit", "bound by", "runs"):
        table.add_column(column, justify="right")
    for row in found.rows:
        if row.skipped:
            table.add_row(row.case, row.kernel, "-", "-", row.skipped, "0")
        else:
            shown = f"{row.seconds * 1e3:.3f} ms" if row.seconds < 1 else f"{row.seconds:.2f} s"
            table.add_row(row.case, row.kernel, shown, f"{row.of_limit:.0%}", row.bound, str(row.runs))
    limits = found.limits
    head = f"measured on {limits.device}: copy {limits.bytes_per_second / 1e9:.1f} GB/s, {limits.dtype} matmul "
    return Group(head + f"{limits.flops_per_second / 1e9:.0f} GFLOP/s", table)
